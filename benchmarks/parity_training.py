"""The job of one layout: a few optimizer steps, whose losses, gradients and parameters stay."""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cudnn_first  # noqa: F401
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from parity_cases import Case
from ranks import layouts

from mhc_megatron.launch.environment import World
from mhc_megatron.megatron.chain import chain_of
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.model import build_chunks, transformer_config, wrap_data_parallel
from mhc_megatron.training.optimizer import build_optimizer, update_groups
from mhc_megatron.training.pipeline import forward_backward_func
from mhc_megatron.training.runtime import distributed_runtime
from mhc_megatron.training.step import run_step


def train(rank: int, world_size: int, config: TrainConfig, case: Case, folder: str) -> list[float]:
    """A job: the losses of all steps.

    The run starts from ``initial`` beside ``folder`` and leaves its ``gradients`` and
    ``parameters`` in it, as distributed checkpoints.
    """
    world = World(rank=rank, local_rank=rank, world_size=world_size)
    # Over context-parallel ranks Transformer Engine has no deterministic attention.
    sums = contextlib.nullcontext() if case.engine else deterministic()
    with sums, distributed_runtime(config, world):
        megatron_config = transformer_config(config)
        chunks = build_chunks(config, megatron_config, vocab_size=layouts.VOCAB)
        initial = initial_of(Path(folder).parent, case)
        loaded = dist_checkpointing.load(layouts.sharded(chunks), str(initial))
        for index, chunk in enumerate(chunks):
            # Without Transformer Engine's extra state, which the checkpoint does not have.
            chunk.load_state_dict(loaded[f"chunk{index}"], strict=False)
        if world_size == 1:
            cut(chunks, case.cuts)
        if case.spoiled:
            drop_sequence_parallel_tags(chunks)
        if case.overlap:
            wrapped = [_overlapping(megatron_config, chunk) for chunk in chunks]
            megatron_config.no_sync_func = wrapped[0].no_sync
        else:
            wrapped = wrap_data_parallel(config, megatron_config, chunks)
        optimizer = build_optimizer(config, wrapped)
        megatron_config.grad_scale_func = optimizer.scale_loss
        forward_backward = forward_backward_func(config, megatron_config)
        if case.halves and world_size == 1:
            forward_backward = partial(layouts.in_halves, forward_backward, megatron_config)
        losses = []
        for step in range(config.steps):
            update_groups(config, optimizer, step)
            for chunk in wrapped:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            whole = step == 0 and not case.overlap
            megatron_config.finalize_model_grads_func = (
                layouts.finalize_whole_gradients if whole else finalize_model_grads
            )
            batches = layouts.micro_batches(config, step)
            losses.append(run_step(config, forward_backward, wrapped, batches))
            if whole:
                _save(_gradients(chunks), Path(folder) / "gradients")
            optimizer.step()
        if case.overlap:
            for chunk in wrapped:
                chunk.disable_forward_pre_hook()
        _save(layouts.sharded(chunks), Path(folder) / "parameters")
    return losses


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Torch's own kernels take the same sums in the same order in every run."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def cut(chunks: list[torch.nn.Module], cuts: int) -> None:
    """Let layers end, and begin, as those at the ends of ``cuts`` + 1 chunks do."""
    layers = [layer for chunk in chunks for layer in chain_of(chunk).layers]
    size = len(layers) // (cuts + 1)
    for layer in layers[size - 1 :: size]:
        layer.hands_over = False


def drop_sequence_parallel_tags(chunks: list[torch.nn.Module]) -> None:
    """The fault of ``Case.spoiled``."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if "hyper_connection" in name:
                parameter.sequence_parallel = False


def _overlapping(megatron_config: Any, chunk: torch.nn.Module) -> DistributedDataParallel:
    elements = sum(parameter.numel() for parameter in chunk.parameters())
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        bucket_size=elements // 8,  # several, so that there is something to overlap
    )
    return DistributedDataParallel(megatron_config, ddp_config, chunk)


def _gradients(chunks: list[torch.nn.Module]) -> dict[str, Any]:
    """The chunks' entries of a checkpoint with gradients as their data.

    The parameters' own data stay: a moment of another dtype would cost them DDP's hooks.
    """
    state = layouts.sharded(chunks)
    for entries in state.values():
        for entry in entries.values():
            entry.data = entry.data.main_grad
            if isinstance(entry, ShardedTensor):
                entry.dtype = entry.data.dtype
    return state


def _save(state: dict[str, Any], folder: Path) -> None:
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(folder))


def initial_of(folder: Path, case: Case) -> Path:
    """The checkpoint from which all layouts of the case's model start."""
    return folder / f"initial_{case.kind}"
