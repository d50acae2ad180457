"""Which checkpoint a run resumes from: the newest that is whole, and that is of this run."""

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from mhc_megatron.errors import UserError
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.manifest import (
    CONFIG,
    Manifest,
    list_checkpoints,
    mark,
    read_manifest,
    wrong_checksum,
    wrong_size,
)
from mhc_megatron.training.model import config_dict

# Sections that define the function being trained and the data order; the layout may change.
_FIXED = ("model", "mhc", "data", "seed", "global_batch_size", "steps", "dtype")
# These change memory and time, and no number.
_FREE = ("mhc.recompute", "mhc.recompute_block")

_LOGGER = logging.getLogger(__name__)

_Value = TypeVar("_Value")


def newest_good(folder: Path, config: TrainConfig) -> Path | None:
    """The newest checkpoint that is whole, to be called by all ranks; None if there is none at all.

    The ranks share the checksums out. A damaged checkpoint is passed over, with a warning.

    Raises:
        UserError: every checkpoint is damaged, or the configuration of the newest whole one
            differs in a field that defines the model or the data order.
    """
    damaged: list[str] = []
    for path in _agreed(lambda: list_checkpoints(folder)[::-1]):
        problem = _damage(path)
        if torch.distributed.get_rank() == 0:
            mark(path, damaged=problem is not None)
        if problem is not None:
            damaged.append(f"checkpoint {path} is damaged: {problem}")
            continue
        if damaged and torch.distributed.get_rank() == 0:
            _LOGGER.warning("%s; resuming from %s instead", "; ".join(damaged), path)
        difference = _agreed(partial(configuration_difference, path, config))
        if difference is not None:
            raise UserError(difference)
        return path
    if damaged:
        raise UserError(
            f"no whole checkpoint is left in {folder}: {'; '.join(damaged)}. Bring one of them "
            "back from a copy, or remove these folders to start from step 0"
        )
    return None


def require_whole(path: Path) -> None:
    """Raise a UserError on every rank if a checkpoint is damaged."""
    problem = _damage(path)
    if problem is not None:
        raise UserError(f"checkpoint {path} is damaged: {problem}; take another one")


def _agreed(find: Callable[[], _Value]) -> _Value:
    """What ``find`` returns on rank 0, on every rank."""
    found: list[Any] = [find() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, the same on every rank; None if it is whole."""
    manifest = _agreed(lambda: _sizes_checked(path))
    if isinstance(manifest, str):
        return manifest
    if manifest.checksums is None:
        if torch.distributed.get_rank() == 0:
            _LOGGER.warning(
                "checkpoint %s is of before checksums were saved: only its file sizes are checked",
                path,
            )
        return None
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # Whoever wrote them: the largest files go to different ranks.
    share = sorted(manifest.sizes, key=lambda name: (-manifest.sizes[name], name))[rank::world_size]
    problems: list[str | None] = [None] * world_size
    torch.distributed.all_gather_object(problems, wrong_checksum(path, manifest, share))
    return next((found for found in problems if found is not None), None)


def _sizes_checked(path: Path) -> Manifest | str:
    """The manifest of a checkpoint with all its bytes, or what is wrong."""
    manifest = read_manifest(path)
    if isinstance(manifest, str):
        return manifest
    return wrong_size(path, manifest) or manifest


def configuration_difference(path: Path, config: TrainConfig) -> str | None:
    """The first difference of a checkpoint's run from ``config`` that matters, as a message.

    The model, the data and their order must be equal; the layout may differ. None if all is well.
    """
    saved, wanted = json.loads((path / CONFIG).read_text()), config_dict(config)
    # A field that is younger than the checkpoint had what is now its default.
    defaults = config_dict(TrainConfig())
    for section in _FIXED:
        old, new = saved[section], wanted[section]
        pairs = (
            [(f"{section}.{key}", old.get(key, defaults[section][key]), new[key]) for key in new]
            if isinstance(new, dict)
            else [(section, old, new)]
        )
        for key, before, now in pairs:
            if before != now and key not in _FREE:
                return (
                    f"checkpoint {path} was saved with {key}={before!r}, this run has {now!r}; "
                    f"set {key}={before} or use another out folder"
                )
    return None
