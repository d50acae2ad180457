"""Distributed checkpoints: published whole or not at all, loadable under any layout.

A checkpoint is a folder ``step_00000100`` with Megatron's distributed format (``torch_dist``),
this run's configuration and a manifest of file sizes and checksums. It is written under a
temporary name and renamed when complete, so a name ``step_*`` never stands for a part of one.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.manifest import (
    CONFIG,
    checksum,
    list_checkpoints,
    surplus,
    write_manifest,
    written_by,
)
from mhc_megatron.training.model import config_dict
from mhc_megatron.training.write_error import require_disk

# Per-rank parameter counts of the optimizer's groups are not common to all ranks.
SAVE_OPTIONS: dict[str, Any] = {"preprocess_common_before_consistancy_check": lambda common: {}}

_PARTIAL = ".partial-"


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _state(chunks: list[torch.nn.Module], optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    metadata = _metadata()
    keys = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    state: dict[str, Any] = {
        key: chunk.sharded_state_dict(prefix="", metadata=metadata)  # type: ignore[operator]
        for key, chunk in zip(keys, chunks, strict=True)
    }
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=metadata
        )
    return state


def save(
    folder: Path,
    step: int,
    *,
    config: TrainConfig,
    chunks: list[torch.nn.Module],
    optimizer: Any | None,
) -> Path:
    """Save model and optimizer after ``step`` steps and remove old checkpoints.

    Args:
        folder: the run's checkpoint folder.
        step: completed optimizer steps.
        config: the run; ``keep_checkpoints`` of the newest checkpoints stay.
        chunks: the bare model chunks (not DDP's wrapper).
        optimizer: Megatron's optimizer; None before its first step, when it has no state.

    Returns:
        The published checkpoint.

    Raises:
        UserError: it cannot be written, as on a full disk. Nothing is left of it, and the
            checkpoints before it are as they were.
    """
    attempt = Attempt(folder=folder, step=step, config=config)
    state = saved_state(step, chunks, optimizer)
    with attempt.guarded():
        attempt.begin()
        dist_checkpointing.save(state, str(attempt.partial), **SAVE_OPTIONS)
        attempt.seal({})
    return attempt.publish()


def saved_state(step: int, chunks: list[torch.nn.Module], optimizer: Any | None) -> dict[str, Any]:
    """What a checkpoint after ``step`` steps holds, for ``dist_checkpointing.save``."""
    state = _state(chunks, optimizer, is_loading=False)
    state["step"] = step
    return state


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One checkpoint on its way: begun, filled by Megatron, sealed, published. By all ranks.

    Attributes:
        folder: the run's checkpoint folder.
        step: completed optimizer steps.
        config: the run.
        tag: of the temporary name, where a writer of an earlier attempt may still be alive.
    """

    folder: Path
    step: int
    config: TrainConfig
    tag: str = ""

    @property
    def final(self) -> Path:
        """The published checkpoint."""
        return self.folder / _name(self.step)

    @property
    def partial(self) -> Path:
        """Where it is written."""
        return self.folder / (_PARTIAL + self.final.name + self.tag)

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Leave nothing behind after a failure inside; the disk's is raised as a UserError."""
        try:
            yield
        except (OSError, RuntimeError, CheckpointException) as error:
            if torch.distributed.get_rank() == 0:
                shutil.rmtree(self.partial, ignore_errors=True)
            require_disk(error, self.final)
            raise

    def begin(self) -> None:
        """Make the folder, without what an attempt at the same step has left behind."""

        def make() -> None:
            for left in self.folder.glob(f"{_PARTIAL}{self.final.name}*"):
                shutil.rmtree(left, ignore_errors=True)
            self.partial.mkdir(parents=True)

        _from_rank_zero(make)

    def seal(self, known: Mapping[str, str]) -> None:
        """Add the configuration and the manifest, once Megatron has written everything.

        Args:
            known: checksums by name of those files of this rank that are hashed already.
        """
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        content = json.dumps(config_dict(self.config), indent=2)
        _from_rank_zero(lambda: (self.partial / CONFIG).write_text(content))
        own = dict(known)
        for path in sorted(self.partial.iterdir()):
            if written_by(path.name, rank=rank, world_size=world_size) and path.name not in own:
                own[path.name] = checksum(path)
        shares: list[dict[str, str]] = [{} for _ in range(world_size)]
        torch.distributed.all_gather_object(shares, own)
        checksums = {name: value for share in shares for name, value in share.items()}
        _from_rank_zero(lambda: write_manifest(self.partial, self.step, checksums))

    def publish(self) -> Path:
        """Give it its name and remove old checkpoints."""
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(self.final, ignore_errors=True)
            os.replace(self.partial, self.final)
            # One of a later step is damaged: the run did not resume from it, and will write it
            # again.
            older = [p for p in list_checkpoints(self.folder) if p.name <= self.final.name]
            for old in surplus(older, keep=self.config.keep_checkpoints):
                shutil.rmtree(old)
        torch.distributed.barrier()
        return self.final


def _from_rank_zero(write: Callable[[], object]) -> None:
    """``write`` on rank 0; its OSError is raised on every rank."""
    failure: list[OSError | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            write()
        except OSError as error:
            failure[0] = error
    torch.distributed.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]


def _sharded_torch_adams(optimizer: Any) -> list[torch.optim.Optimizer]:
    """torch's Adams inside distributed optimizers; the fused ones of TE and apex need no help."""
    wrappers = getattr(optimizer, "chained_optimizers", [optimizer])
    return [
        wrapper.optimizer
        for wrapper in wrappers
        if isinstance(wrapper, DistributedOptimizer)
        and isinstance(wrapper.optimizer, torch.optim.Adam | torch.optim.AdamW)
    ]


def _allocate_states(adam: torch.optim.Optimizer) -> None:
    """Make Adam's zero state now; Megatron asks every parameter's step count before it loads."""
    if adam.state:
        return
    for group in adam.param_groups:
        group["lr"] = 0.0  # the step must not move a parameter; training sets the real rate
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    adam.step()
    adam.zero_grad()


@contextlib.contextmanager
def _step_counts_apart(adams: list[torch.optim.Optimizer]) -> Iterator[None]:
    """Keep the loaded step counts out of the states until Megatron has filled the tensors.

    Megatron loads the counts with the groups, then copies a saved tensor into every entry of the
    state, and finds none for the count (core 0.16 to 0.19). It also hands every parameter the
    same count tensor, which Adam would then increment once per parameter: each gets its own.
    """
    counts: list[tuple[dict[str, Any], Any]] = []

    def set_apart(adam: torch.optim.Optimizer) -> None:
        counts.extend((state, state.pop("step")) for state in adam.state.values())

    with contextlib.ExitStack() as stack:
        for adam in adams:
            stack.callback(adam.register_load_state_dict_post_hook(set_apart).remove)
        yield
    for state, count in counts:
        state["step"] = count.clone()


def load(path: Path, *, chunks: list[torch.nn.Module], optimizer: Any) -> int:
    """Load model and optimizer saved under any layout; returns the completed steps.

    A checkpoint of step 0 has no optimizer: this one starts from the loaded parameters.
    """
    if _step(path) == 0:
        state = _state(chunks, None, is_loading=True)
        _load_chunks(dist_checkpointing.load(state, str(path)), chunks)
        optimizer.reload_model_params()
        return 0
    adams = _sharded_torch_adams(optimizer)
    for adam in adams:
        _allocate_states(adam)
    state = _state(chunks, optimizer, is_loading=True)
    loaded = dist_checkpointing.load(state, str(path))
    _load_chunks(loaded, chunks)
    with _step_counts_apart(adams):
        optimizer.load_state_dict(loaded["optimizer"])
    return int(loaded["step"])


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _load_chunks(loaded: dict[str, Any], chunks: list[torch.nn.Module]) -> None:
    for key, chunk in zip([k for k in loaded if k.startswith("model")], chunks, strict=True):
        chunk.load_state_dict(loaded[key])
