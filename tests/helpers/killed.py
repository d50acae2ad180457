"""A rank that dies by SIGKILL in a phase: ``python -m helpers.killed CONFIG_JSON RANK PHASE``."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch


def _die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _in_step() -> None:
    """In the second forward of a micro-batch in training."""
    from megatron.core.models.gpt import GPTModel

    forwards = 0

    def count(module: torch.nn.Module, arguments: object) -> None:
        nonlocal forwards
        forwards += isinstance(module, GPTModel) and module.training
        if forwards == 2:
            _die()

    torch.nn.modules.module.register_module_forward_pre_hook(count)


def _in_save() -> None:
    """When the shards are written and their checksums are due; nothing is published."""
    from mhc_megatron.training import checkpoint

    checkpoint.written_by = _die  # type: ignore[assignment]


def _in_load() -> None:
    """When the model's tensors are about to be read."""
    from mhc_megatron.training import checkpoint

    def load(state: Any, path: str) -> None:
        assert Path(path).is_dir()
        _die()

    checkpoint.dist_checkpointing.load = load  # type: ignore[assignment]


PHASES = {"step": _in_step, "save": _in_save, "load": _in_load}


def main(arguments: list[str]) -> int:
    """A rank of the run; one of them dies."""
    file, rank, phase = arguments
    if os.environ["RANK"] == rank:
        PHASES[phase]()
    from mhc_megatron.training import worker

    return worker.main([file])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
