"""Jobs for the worker pool: one model under any layout, its losses, gradients and parameters.

Distributed checkpoints are the common language of the layouts: the entries of
``sharded_state_dict`` say where each local tensor lies in the global model, so parameters that one
layout saved load into any other, and gradients saved in the parameters' place can be compared
entry by entry.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig

from mhc_megatron.launch.environment import World
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.model import build_chunks, transformer_config, wrap_data_parallel
from mhc_megatron.training.pipeline import data_rank, forward_backward_func
from mhc_megatron.training.runtime import distributed_runtime
from mhc_megatron.training.step import Batch, run_step

VOCAB = 120


def sample(index: int, seq_length: int) -> Batch:
    """Sample ``index`` of an endless corpus; the same on every rank and in every layout."""
    generator = torch.Generator().manual_seed(index)
    tokens = torch.randint(0, VOCAB, (1, seq_length + 1), generator=generator)
    mask = (torch.rand(1, seq_length, generator=generator) > 0.1).float()
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": mask,
        "position_ids": torch.arange(seq_length)[None],
    }


def micro_batches(config: TrainConfig, step: int) -> list[Batch]:
    """This data-parallel rank's micro-batches of a step; the global batch is the same set."""
    replica, device = data_rank(config), torch.cuda.current_device()
    size = config.micro_batch_size
    batches = []
    for index in range(config.num_micro_batches):
        first = step * config.global_batch_size + (index * config.parallel.data + replica) * size
        samples = [sample(first + i, config.model.seq_length) for i in range(size)]
        batches.append({key: torch.cat([s[key] for s in samples]).to(device) for key in samples[0]})
    return batches


def sharded(chunks: list[torch.nn.Module]) -> dict[str, Any]:
    """The chunks' entries of a distributed checkpoint."""
    state: dict[str, Any] = {}
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for index, chunk in enumerate(chunks):
        entries = chunk.sharded_state_dict(prefix="", metadata={"dp_cp_group": group})
        # Extra state belongs to Transformer Engine and holds no parameters.
        state[f"chunk{index}"] = {k: v for k, v in entries.items() if "_extra_state" not in k}
    return state


def randomise(chunks: list[torch.nn.Module], seed: int) -> None:
    """Give the hyper-connections parameters at which no gradient vanishes."""
    generator = torch.Generator().manual_seed(seed)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if "hyper_connection" in name or "contraction" in name:
                scale = 0.02 if parameter.dim() > 1 else 0.5
                noise = torch.randn(parameter.shape, generator=generator) * scale
                with torch.no_grad():
                    parameter.add_(noise.to(parameter.device))


def save_initial(rank: int, world_size: int, config: TrainConfig, folder: str) -> None:
    """Build the model in one process, randomise it and save its parameters."""
    world = World(rank=rank, local_rank=rank, world_size=world_size)
    with distributed_runtime(config, world, backend="gloo"):  # NCCL takes seconds to start
        chunks = build_chunks(config, transformer_config(config), vocab_size=VOCAB)
        randomise(chunks, seed=7)
        dist_checkpointing.save(sharded(chunks), folder)


def finalize_whole_gradients(*args: Any, **kwargs: Any) -> None:
    """Whole gradients on every rank, also where the distributed optimizer needs only its shard."""
    finalize_model_grads(*args, **{**kwargs, "force_all_reduce": True})


def in_halves(
    function: Callable[..., list[Any]],
    config: TransformerConfig,
    *,
    model: list[torch.nn.Module],
    num_microbatches: int,
    **others: Any,
) -> list[Any]:
    """A forward_backward_func that adds up either half of the micro-batches by itself."""
    finalize, config.finalize_model_grads_func = config.finalize_model_grads_func, None
    reports, sums = [], []
    for _ in range(2):
        reports += function(model=model, num_microbatches=num_microbatches // 2, **others)
        parameters = [parameter for chunk in model for parameter in chunk.parameters()]
        sums.append([parameter.main_grad.clone() for parameter in parameters])
        for chunk in model:
            chunk.zero_grad_buffer()
    for parameter, first, second in zip(parameters, *sums, strict=True):
        parameter.main_grad.copy_(first + second)
    num_tokens = sum(report["lm"][1] for report in reports)
    config.finalize_model_grads_func = finalize
    finalize(model, num_tokens.to(torch.int))
    return reports


def losses_and_gradients(
    rank: int,
    world_size: int,
    config: TrainConfig,
    initial: str,
    gradients: str,
    spoil: Callable[[list[torch.nn.Module]], None] | None = None,
    halves: bool = False,
) -> float:
    """One forward and backward from the saved parameters; the gradients go to ``gradients``.

    ``spoil`` may damage the model before the step: mutation checks use it. ``halves`` adds up the
    gradients of either half of the micro-batches by itself, as bidirectional DualPipe does.
    """
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        megatron_config = transformer_config(config)
        chunks = build_chunks(config, megatron_config, vocab_size=VOCAB)
        dist_checkpointing.load(sharded(chunks), initial)
        if spoil is not None:
            spoil(chunks)
        wrapped = wrap_data_parallel(config, megatron_config, chunks)
        megatron_config.finalize_model_grads_func = finalize_whole_gradients
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        forward_backward = forward_backward_func(config, megatron_config)
        if halves:
            forward_backward = partial(in_halves, forward_backward, megatron_config)
        loss = run_step(config, forward_backward, wrapped, micro_batches(config, step=0))
        with torch.no_grad():
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.data = parameter.main_grad.clone()
        dist_checkpointing.save(sharded(chunks), gradients)
        return loss


def differences(rank: int, world_size: int, left: str, right: str) -> dict[str, float]:
    """Relative error ||a - b|| / ||b|| of every tensor of two distributed checkpoints.

    A tensor that one side lacks, has another shape or is not finite counts as infinitely far.
    """
    single = TrainConfig(micro_batch_size=1, global_batch_size=1)
    world = World(rank=rank, local_rank=rank, world_size=world_size)
    with distributed_runtime(single, world, backend="gloo"):
        a, b = (dist_checkpointing.load_plain_tensors(folder) for folder in (left, right))
    errors = {}
    for name in sorted(a.keys() | b.keys()):
        x, y = a.get(name), b.get(name)
        if x is None or y is None or x.shape != y.shape:
            errors[name] = float("inf")
            continue
        error = (x.double() - y.double()).norm() / y.double().norm()
        errors[name] = error.item() if error.isfinite() else float("inf")
    return errors
