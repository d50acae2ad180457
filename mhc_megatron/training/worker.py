"""One rank of a training run: ``python -m mhc_megatron.training.worker CONFIG_JSON``.

The launcher starts it once per process of the layout; torchrun or srun may, too.
"""

import json
import sys
from pathlib import Path

from mhc_megatron.errors import UserError
from mhc_megatron.launch.environment import world_from_environment
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.overrides import from_dict


def main(arguments: list[str]) -> int:
    """Run this rank; 0 on success, 2 after a UserError (printed by rank 0 as one line)."""
    world = world_from_environment()
    config = from_dict(TrainConfig, json.loads(Path(arguments[0]).read_text()))
    try:
        from mhc_megatron.training.loop import train

        train(config, world)
    except UserError as error:
        if world.rank == 0:
            print(f"mhc-megatron: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
