"""Megatron's model chunks as stages of a schedule."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import forward_step
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mhc_megatron.megatron.chain import chain_of
from mhc_megatron.megatron.delayed_wgrad import QueuedWeightGrads
from mhc_megatron.megatron.overlap import PhasedStage
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.stage import AutogradStage
from mhc_megatron.recompute import ForwardRecompute


class ChunkStages:
    """The chunks of this rank as the stages of one step, and what they share.

    Args:
        forward_step_func: Megatron's.
        config: the chunks' configuration.
        schedule: of the step.
        forward_only: nothing is kept for a backward.
        collect_non_loss_data: as Megatron's forward_backward_func takes it.
        first_val_step: as Megatron's forward_backward_func takes it.

    Attributes:
        reports: what the loss function reports, per micro-batch of this rank's last stage.
        num_tokens: tokens that this rank's losses count, int.
    """

    def __init__(
        self,
        *,
        forward_step_func: Callable[..., Any],
        config: TransformerConfig,
        schedule: Schedule,
        forward_only: bool,
        collect_non_loss_data: bool,
        first_val_step: bool | None,
    ) -> None:
        self.reports: list[Any] = []
        self.num_tokens = torch.zeros((), dtype=torch.int, device=torch.cuda.current_device())
        self._forward_step_func, self._config = forward_step_func, config
        self._num_mb, self._num_stages = schedule.num_mb, schedule.num_stages
        # Those of one replica, by which Megatron divides a mean loss before it averages replicas.
        self._num_microbatches = schedule.num_mb // schedule.placement.num_copies
        self._sources: list[_Source] = []
        self._forward_only, self._collect = forward_only, collect_non_loss_data
        self._may_be_first = first_val_step is None or not forward_only or first_val_step

    def stage(self, stage: int, chunk: torch.nn.Module, data: Iterator[Any]) -> AutogradStage:
        """A chunk as a stage; micro-batches come in the order of ``data``."""
        is_last = stage == self._num_stages - 1
        source = _Source(data)
        self._sources.append(source)
        chain, queued = chain_of(chunk), QueuedWeightGrads(chunk)
        recompute, marker = (None, None) if chain is None else (chain.recompute, chain.marker)
        dropped: dict[int, ForwardRecompute] = {}
        first: int | None = None

        def forward(mb: int, x: Tensor | None) -> Tensor:
            nonlocal first
            first = mb if first is None else first
            source.skip_to(mb)
            source.position += 1
            if marker is not None:
                marker.start()
            output, num_tokens = forward_step(
                self._forward_step_func,
                data,
                chunk,
                self._num_microbatches,
                x,
                self.reports,
                self._config,
                parallel_state.get_context_parallel_world_size(),
                collect_non_loss_data=self._collect,
                is_first_microbatch=self._may_be_first and mb == first,
                current_microbatch=mb,
                is_last_stage=is_last,
            )
            if recompute is not None and not self._forward_only:
                dropped[mb] = recompute.take()
            if is_last:
                self.num_tokens = self.num_tokens + num_tokens
                if self._config.grad_scale_func is not None and not self._forward_only:
                    output = self._config.grad_scale_func(output)
            if marker is not None:
                marker.end(output)
            return output

        def rebuild(mb: int) -> None:
            if mb in dropped:
                dropped.pop(mb).rebuild()

        options: dict[str, Any] = {
            "rebuild": rebuild,
            "queued": queued.take if queued else None,
            "name": f"stage {stage}",
        }
        if marker is None:
            return AutogradStage(forward, **options)
        ahead = marker.rebuilds_ahead and recompute is not None
        return PhasedStage(forward, marker, take_dropped=dropped.pop if ahead else None, **options)

    def skip_what_others_took(self) -> None:
        """Leave every chunk's data at the next step's first micro-batch."""
        for source in self._sources:
            source.skip_to(self._num_mb)


class _Source:
    """A chunk's micro-batches, some of which another copy of its stage takes."""

    def __init__(self, data: Iterator[Any] | None) -> None:
        self.data, self.position = data, 0

    def skip_to(self, mb: int) -> None:
        assert self.position <= mb, f"micro-batch {mb} after {self.position - 1}"
        if self.data is not None:  # Megatron gives an iterator to the first tensor-parallel rank
            for _ in range(mb - self.position):
                next(self.data)
        self.position = mb
