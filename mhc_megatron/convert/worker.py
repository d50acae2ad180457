"""The process that up-cycles: ``python -m mhc_megatron.convert.worker SOURCE CONFIG_JSON``."""

import json
import sys
from pathlib import Path

from mhc_megatron.errors import UserError
from mhc_megatron.launch.environment import world_from_environment


def main(arguments: list[str]) -> int:
    """Write the checkpoint; 0, or 2 after a UserError."""
    from mhc_megatron.convert.upcycle import upcycle
    from mhc_megatron.training.config import TrainConfig
    from mhc_megatron.training.overrides import from_dict

    source, config = arguments
    world = world_from_environment()
    assert world is not None
    try:
        written = upcycle(
            Path(source), from_dict(TrainConfig, json.loads(Path(config).read_text())), world
        )
    except UserError as error:
        print(f"mhc-megatron: error: {error}", file=sys.stderr)
        return 2
    print(f"{written}: mhc-megatron train with this configuration and out folder resumes from it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
