"""``mhc-megatron`` where a chosen node or rank cannot multiply.

The first argument is the environment variable that chooses, as RANK=1 or SLURMD_NODENAME=n1; the
others are the command's.
"""

import os
import sys

from mhc_megatron.launch import measure_node
from mhc_megatron.launch.cli import main


def _lost(device: object) -> tuple[float, bool]:
    raise RuntimeError("CUDA error: GPU is lost\nCUDA kernel errors might be reported later")


if __name__ == "__main__":
    name, _, value = sys.argv[1].partition("=")
    if os.environ.get(name) == value:
        measure_node._product = _lost
    sys.exit(main(sys.argv[2:]))
