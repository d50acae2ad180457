"""One rank of a training run: ``python -m mhc_megatron.training.worker CONFIG_JSON``.

The local launcher starts it once per process of the layout.
"""

import json
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path

from mhc_megatron.errors import UserError
from mhc_megatron.launch.environment import World, stop_signals, world_from_environment
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.overrides import from_dict
from mhc_megatron.training.stop import stop_request


def run(config: TrainConfig, world: World) -> int:
    """Train as one rank; returns 0, or after printing it 2 for a UserError, 1 for another error.

    On GPUs a rank that failed ends here: what NCCL does when Python ends waits for the others.
    """
    try:
        status = _run(config, world)
    except Exception:
        traceback.print_exc()
        status = 1
    leave(status)
    return status


def leave(status: int) -> None:
    """End this process after a failure on a GPU, without a word to the other ranks."""
    import torch

    if status and torch.cuda.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run(config: TrainConfig, world: World) -> int:
    """0, or 2 after a UserError, which rank 0 prints as one line."""
    _silence_megatron()
    with stop_request(stop_signals()) as stop:
        # Imported after the filters and the handlers: megatron-core warns, and takes its time.
        from mhc_megatron.cudnn import load_torchs_cudnn

        load_torchs_cudnn()  # before megatron-core imports Transformer Engine
        from mhc_megatron.training.loop import train

        try:
            train(config, world, stop)
        except UserError as error:
            if world.rank == 0:
                print(f"mhc-megatron: error: {error}", file=sys.stderr)
            return 2
    return 0


def _silence_megatron() -> None:
    """Keep megatron-core's notes on optional packages and deprecations out of the progress bar."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", module=r"torch\.")
    logging.getLogger("megatron").setLevel(logging.ERROR)


def main(arguments: list[str]) -> int:
    """Read the configuration and this process's place from the environment, then train."""
    world = world_from_environment() or World(rank=0, local_rank=0, world_size=1)
    config = from_dict(TrainConfig, json.loads(Path(arguments[0]).read_text()))
    return run(config, world)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
