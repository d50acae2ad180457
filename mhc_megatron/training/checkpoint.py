"""Distributed checkpoints: published whole or not at all, loadable under any layout.

A checkpoint is a folder ``step_00000100`` with Megatron's distributed format (``torch_dist``),
this run's configuration and a manifest of file sizes. It is written under a temporary name and
renamed when complete, so a name ``step_*`` never stands for a part of one.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from mhc_megatron.errors import UserError
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.model import config_dict

_MANIFEST, _CONFIG = "manifest.json", "train_config.json"
_PARTIAL = ".partial-"
# Sections that define the function being trained and the data order; the layout may change.
_FIXED = ("model", "mhc", "data", "seed", "global_batch_size", "steps", "dtype")
# These change memory and time, and no number.
_FREE = ("mhc.recompute", "mhc.recompute_block")


def _name(step: int) -> str:
    return f"step_{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / _MANIFEST).is_file())


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
    optimizer: Any,
) -> Path:
    """Save model and optimizer after ``step`` steps and remove old checkpoints.

    Args:
        folder: the run's checkpoint folder.
        step: completed optimizer steps.
        config: the run; ``keep_checkpoints`` of the newest checkpoints stay.
        chunks: the bare model chunks (not DDP's wrapper).
        optimizer: Megatron's optimizer.

    Returns:
        The published checkpoint.
    """
    final, partial = folder / _name(step), folder / (_PARTIAL + _name(step))
    is_first = torch.distributed.get_rank() == 0
    if is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    state = _state(chunks, optimizer, is_loading=False)
    state["step"] = step
    # Per-rank parameter counts of the optimizer's groups are not common to all ranks.
    dist_checkpointing.save(
        state, str(partial), preprocess_common_before_consistancy_check=lambda common: {}
    )
    torch.distributed.barrier()
    if is_first:
        (partial / _CONFIG).write_text(json.dumps(config_dict(config), indent=2))
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        (partial / _MANIFEST).write_text(json.dumps({"step": step, "files": sizes}, indent=2))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in list_checkpoints(folder)[: -config.keep_checkpoints]:
            shutil.rmtree(old)
    torch.distributed.barrier()
    return final


def verify(path: Path, config: TrainConfig) -> int:
    """Check a checkpoint before anything is loaded; returns its step.

    Raises:
        UserError: a file is missing or truncated, or the configuration differs in a field that
            defines the model or the data order.
    """
    manifest = json.loads((path / _MANIFEST).read_text())
    for name, size in manifest["files"].items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise UserError(
                f"checkpoint {path} is damaged: {name} {state}; remove that folder to resume from "
                "the checkpoint before it"
            )
    saved, wanted = json.loads((path / _CONFIG).read_text()), config_dict(config)
    for section in _FIXED:
        old, new = saved[section], wanted[section]
        pairs = (
            [(f"{section}.{key}", old.get(key), new[key]) for key in new]
            if isinstance(new, dict)
            else [(section, old, new)]
        )
        for key, before, now in pairs:
            if before != now and key not in _FREE:
                raise UserError(
                    f"checkpoint {path} was saved with {key}={before!r}, this run has {now!r}; "
                    f"set {key}={before} or use another out folder"
                )
    return int(manifest["step"])


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
    """Load model and optimizer saved under any layout; returns the completed steps."""
    adams = _sharded_torch_adams(optimizer)
    for adam in adams:
        _allocate_states(adam)
    state = _state(chunks, optimizer, is_loading=True)
    loaded = dist_checkpointing.load(state, str(path))
    for key, chunk in zip([k for k in state if k.startswith("model")], chunks, strict=True):
        chunk.load_state_dict(loaded[key])
    with _step_counts_apart(adams):
        optimizer.load_state_dict(loaded["optimizer"])
    return int(loaded["step"])
