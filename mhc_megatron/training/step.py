"""One step of forward and backward, and its loss."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from mhc_megatron.megatron.compat import batch_on_this_cp_rank
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.pipeline import ForwardBackwardFunction

Batch = dict[str, Tensor]


def masked_loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the token losses; Megatron divides by the step's tokens over all ranks.

    Args:
        loss_mask: [b, s], 1 where a token counts.
        losses: [b, s] float32 cross entropies.

    Returns:
        (loss sum, token count int, {"lm": [loss sum, token count]} for reporting).
    """
    total = (losses.float() * loss_mask).sum()
    tokens = loss_mask.sum()
    report = torch.stack([total.detach(), tokens.detach()])
    return total, tokens.to(torch.int32), {"lm": report}


def forward_step(data: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    """Megatron's ``forward_step_func``: one micro-batch through one model chunk."""
    batch = batch_on_this_cp_rank(next(data))
    losses = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return losses, partial(masked_loss, batch["loss_mask"])


def run_step(
    config: TrainConfig,
    forward_backward: ForwardBackwardFunction,
    chunks: list[torch.nn.Module],
    micro_batches: list[Batch],
    *,
    forward_only: bool = False,
) -> float:
    """All micro-batches of one step through the pipeline.

    Args:
        config: the run.
        forward_backward: from ``forward_backward_func``.
        chunks: this rank's model chunks.
        micro_batches: this data-parallel rank's share of the global batch.
        forward_only: evaluate without gradients.

    Returns:
        The mean loss per token over the global batch, the same number on every rank.
    """
    return launch_step(
        config, forward_backward, chunks, micro_batches, forward_only=forward_only
    ).item()


def launch_step(
    config: TrainConfig,
    forward_backward: ForwardBackwardFunction,
    chunks: list[torch.nn.Module],
    micro_batches: list[Batch],
    *,
    forward_only: bool = False,
) -> Tensor:
    """``run_step`` whose loss, a float64 scalar, is there when the GPU has come so far."""
    reports = forward_backward(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(micro_batches),
        seq_length=config.model.seq_length,
        micro_batch_size=config.micro_batch_size,
        forward_only=forward_only,
    )
    total = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    for report in reports:
        total += report["lm"].to(torch.float64)
    torch.distributed.all_reduce(
        total, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    # Only the rank of the last stage has reports; the others add zero.
    torch.distributed.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return total[0] / total[1]
