"""A plain-residual checkpoint as the start of an mHC model that computes the same function.

The streams start as copies of the plain residual stream and stay copies: H_post is 1 and the rows
of H_res sum to 1 (docs/math.md, The first forward pass). Unlike the initial values of training
from scratch, H_pre and a learned contraction start with weights that sum to 1, so that every norm
reads exactly the plain stream, whatever its eps.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.transformer.module import Float16Module

from mhc_megatron.config import MHCConfig
from mhc_megatron.convert.distributed import INDEX
from mhc_megatron.data.tokenizer import load_tokenizer
from mhc_megatron.errors import UserError
from mhc_megatron.hyper_connection import HyperConnection
from mhc_megatron.launch.environment import World
from mhc_megatron.streams import Contraction
from mhc_megatron.training import checkpoint
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.layout import ParallelConfig
from mhc_megatron.training.manifest import CONFIG, list_checkpoints
from mhc_megatron.training.model import build_chunks, transformer_config
from mhc_megatron.training.overrides import apply_overrides, from_dict
from mhc_megatron.training.runtime import distributed_runtime
from mhc_megatron.training.verify import require_whole


def upcycled_config(source: Path, overrides: Sequence[str], *, out: str) -> TrainConfig:
    """The mHC run that a baseline's checkpoint is to start, laid out on one process.

    Args:
        source: a checkpoint of a run with ``model.residual=plain``.
        overrides: ``key=value`` of ``mhc.*``, and of what a new run may change.
        out: the new run's folder.

    Raises:
        UserError: no such checkpoint, not a baseline, a configuration that cannot start with the
            baseline's function, or a folder that has checkpoints.
    """
    if not (source / CONFIG).is_file():
        if (source / INDEX).is_file() or list(source.glob("iter_*")):
            raise UserError(
                f"{source} is of Megatron's own loop, and has no configuration of mhc-megatron "
                "train; let your model provider load it with start_from_plain "
                "(docs/checkpoints.md, From a checkpoint of Megatron's own loop)"
            )
        raise UserError(
            f"{source} is not a checkpoint of mhc-megatron train; name a folder such as "
            "runs/plain/checkpoints/step_00000100"
        )
    saved = from_dict(TrainConfig, json.loads((source / CONFIG).read_text()))
    if saved.model.residual != "plain":
        raise UserError(
            f"{source} has model.residual={saved.model.residual!r}; only a plain baseline can "
            "become an mHC model"
        )
    config = apply_overrides(saved, ["model.residual=mhc", *overrides, f"out={out}"])
    model = dataclasses.replace(config.model, residual="plain")
    if model != saved.model or config.dtype != saved.dtype:
        raise UserError("model.* and dtype are the baseline's; override mhc.* and the training")
    require_exact(config.mhc)
    if found := list_checkpoints(Path(out) / "checkpoints"):
        raise UserError(f"{found[-1]} exists; choose another --out")
    parallel = ParallelConfig(distributed_optimizer=config.parallel.distributed_optimizer)
    return dataclasses.replace(config, parallel=parallel)


def require_exact(mhc: MHCConfig) -> None:
    """Raise a UserError where the baseline's function is met only about."""
    if mhc.num_streams == 1:
        raise UserError(
            "mhc.num_streams=1: H_pre is a sigmoid and cannot be 1; use at least 2 streams"
        )
    if mhc.projection == "sinkhorn_v4":
        raise UserError(
            "mhc.projection='sinkhorn_v4': its rows fall short of 1 by sinkhorn_eps; use "
            "mhc.projection=sinkhorn"
        )
    if mhc.contraction == "sum":
        raise UserError(
            f"mhc.contraction='sum' hands {mhc.num_streams} times the baseline's stream to the "
            "final norm, whose eps does not scale; use mhc.contraction=mean"
        )


@torch.no_grad()
def start_as_plain(model: torch.nn.Module) -> None:
    """Set what reads the streams so that its weights sum to 1; the rest is as initialised."""
    for module in model.modules():
        if isinstance(module, HyperConnection) and module.mhc.projection != "unconstrained":
            n = module.num_streams
            pre = module.bias[:n]
            home = torch.sigmoid(pre.max().double()).item()
            pre[pre != pre.max()] = _logit((1 - home) / (n - 1))
        if isinstance(module, Contraction) and module.mhc.contraction == "learned":
            module.bias.fill_(_logit(1 / module.num_streams - module.mhc.sinkhorn_eps))


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def upcycle(source: Path, config: TrainConfig, world: World) -> Path:
    """Write the first checkpoint, ``step_00000000``, of ``config``; for one process.

    Args:
        source: the baseline's checkpoint, of any layout.
        config: from ``upcycled_config``.
        world: this process.

    Returns:
        The checkpoint: the baseline's weights, and hyper-connections as ``start_as_plain``
        sets them; no optimizer, as none has made a step.

    Raises:
        UserError: the baseline's checkpoint is damaged.
    """
    with distributed_runtime(config, world):
        require_whole(source)
        megatron_config = transformer_config(config)
        vocab_size = load_tokenizer(config.data.tokenizer).vocab_size
        [chunk] = build_chunks(config, megatron_config, vocab_size=vocab_size)
        start_from_plain([chunk], source)
        folder = Path(config.out) / "checkpoints"
        return checkpoint.save(folder, 0, config=config, chunks=[chunk], optimizer=None)


def start_from_plain(chunks: Sequence[Any], source: Path) -> None:
    """Load a plain checkpoint into a model with hyper-connections, which then computes the same.

    A collective operation, called by all ranks after ``parallel_state`` is initialised. The layout
    may be another than the checkpoint's.

    Args:
        chunks: this rank's GPTModels with ``gpt_block_spec``'s hyper-connections, one for every
            virtual stage, alone or in a Float16Module.
        source: a distributed checkpoint (``torch_dist``) of the plain model: a folder ``step_*`` of
            ``mhc-megatron train``, or ``iter_*`` of Megatron's own loop.

    Raises:
        UserError: hyper-connections that meet the plain function only about.
    """
    models = [chunk.module if isinstance(chunk, Float16Module) else chunk for chunk in chunks]
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    entries: dict[str, Any] = {}
    added: list[tuple[str, ...]] = []
    for index, model in enumerate(models):
        parts = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, HyperConnection | Contraction)
        }
        for module in parts.values():
            require_exact(module.mhc)
        added.append(tuple(f"{name}." for name in parts))
        # All other entries have the plain model's names.
        entries[f"model{index}"] = {
            name: entry
            for name, entry in model.sharded_state_dict(metadata={"dp_cp_group": group}).items()
            if not name.startswith(added[index])
        }
    loaded = dist_checkpointing.load(entries, str(source))
    for index, model in enumerate(models):
        missing = model.load_state_dict(loaded[f"model{index}"], strict=False).missing_keys
        assert all(name.startswith(added[index]) for name in missing), missing
        start_as_plain(model)
