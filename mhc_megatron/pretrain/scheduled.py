"""A pipeline schedule of ours in Megatron's training loop."""

from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from types import ModuleType
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.megatron.delayed_wgrad import delay_weight_gradients
from mhc_megatron.megatron.schedule import ForwardBackward
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pretrain.layout import num_micro_batches
from mhc_megatron.pretrain.loop import loop_with
from mhc_megatron.training.layout import ParallelConfig
from mhc_megatron.training.optimizer import float32_apart
from mhc_megatron.training.pipeline import connected_step, layout_schedule

_BUILDER = "mhc_megatron.pretrain.stages.StageModelBuilder"

Report = dict[str, Tensor]


class ScheduledStep:
    """``forward_backward_func`` of Megatron's loop: steps of a schedule of ours.

    Its communicators are made at the first call, when Megatron has made its process groups. The
    losses, which the rank of the last stage has, go to Megatron's last pipeline rank, whose log and
    TensorBoard show them.

    Args:
        layout: with the schedule.
        mhc: the hyper-connections.
        num_micro_batches: of a step.
        timeout: of a message.
    """

    def __init__(
        self,
        layout: ParallelConfig,
        mhc: MHCConfig,
        *,
        num_micro_batches: int,
        timeout: timedelta,
    ) -> None:
        self.schedule: Schedule = layout_schedule(
            layout, num_mb=num_micro_batches, rebuilds=mhc.recompute != "none"
        )
        self._layout, self._mhc, self._timeout = layout, mhc, timeout
        self._step: ForwardBackward | None = None
        self._forms: dict[bool, Any] = {}

    def __call__(self, *, forward_only: bool = False, **arguments: Any) -> list[Report]:
        """As ``ForwardBackward``, with the last stage's reports on Megatron's last rank as well."""
        if self._step is None:
            group = parallel_state.get_pipeline_model_parallel_group()
            self._step = connected_step(
                self._layout,
                self.schedule,
                torch.distributed.get_process_group_ranks(group),
                hidden_parts=self._mhc.hidden_parts,
                backend=self._mhc.backend,
                timeout=self._timeout,
            )
        reports = self._step(forward_only=forward_only, **arguments)
        return self._to_last_rank(reports, forward_only)

    def _to_last_rank(self, reports: list[Report], forward_only: bool) -> list[Report]:
        source = self.schedule.placement.ranks[-1]
        if source == self.schedule.num_ranks - 1:
            return reports
        group = parallel_state.get_pipeline_model_parallel_group()
        rank = torch.distributed.get_process_group_ranks(group)[source]
        if forward_only not in self._forms:  # of every step the same: the host waits once
            forms = [[{key: _form(value) for key, value in each.items()} for each in reports]]
            torch.distributed.broadcast_object_list(forms, rank, group=group)
            self._forms[forward_only] = forms[0]
        forms = self._forms[forward_only]
        sizes = [size for form in forms for _, _, size in form.values()]
        if reports:
            values = [value for report in reports for value in report.values()]
            packed = torch.cat([value.reshape(-1).view(torch.uint8) for value in values])
        else:
            device = torch.cuda.current_device()
            packed = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        torch.distributed.broadcast(packed, rank, group=group)
        parts = iter(packed.split(sizes))
        return [
            {
                key: next(parts).clone().view(dtype).view(shape)
                for key, (shape, dtype, _) in form.items()
            }
            for form in forms
        ]


def _form(value: Tensor) -> tuple[torch.Size, torch.dtype, int]:
    """Shape, dtype and bytes."""
    return value.shape, value.dtype, value.numel() * value.element_size()


def scheduled_loop(step: Callable[..., list[Any]]) -> ModuleType:
    """Megatron's loop, with the steps of ``step``.

    A rank's two stages are two chunks: with them, float32 parameters need groups of their own, or
    the distributed optimizer would save a parameter the state of another.

    Raises:
        UserError: the installed Megatron's loop cannot take another schedule.
    """
    return loop_with(
        get_forward_backward_func=lambda _: lambda **_: step,
        get_megatron_optimizer_config=lambda megatrons: partial(_optimizer_config, megatrons),
    )


def _optimizer_config(megatrons: Callable[[Namespace], Any], args: Namespace) -> tuple[Any, Any]:
    config, overrides = megatrons(args)
    half = config.bf16 or config.fp16
    return config, overrides | float32_apart(config.lr) if half else overrides


def run_schedule(
    args: Namespace, model_config: Any, mhc: MHCConfig, layout: ParallelConfig
) -> ScheduledStep:
    """Let Megatron build and run the stages of ``layout.schedule``.

    Args:
        args: Megatron's, which the loop reads: under a schedule with two stages per rank, it gets
            an iterator over the data for each.
        model_config: the ``GPTModelConfig``.
        mhc: the hyper-connections.
        layout: from ``layout_from_args``.

    Raises:
        UserError: Megatron's arguments let the GPU have one hardware queue, and the lanes of
            ``layout.overlap`` need more.
    """
    _check_connections(layout)
    step = ScheduledStep(
        layout,
        mhc,
        num_micro_batches=num_micro_batches(args),
        timeout=timedelta(minutes=args.distributed_timeout_minutes),
    )
    stages_per_rank = layout.num_stages // layout.pipeline
    args.virtual_pipeline_model_parallel_size = stages_per_rank if stages_per_rank > 1 else None
    transformer = model_config.transformer
    transformer.pipeline_model_parallel_size = layout.num_stages
    if layout.splits_backward and transformer.transformer_impl == "transformer_engine":
        delay_weight_gradients(transformer)
    model_config.builder = _BUILDER
    model_config.placement = step.schedule.placement
    return step


def _check_connections(layout: ParallelConfig) -> None:
    # As validate_args of megatron.training.arguments, which has accepted the arguments by now.
    if layout.overlap == "none" or layout.tensor * layout.context == 1:
        return
    if not torch.cuda.is_available() or not isinstance(torch.cuda.current_device(), int):
        return  # in the CPU runtime the loop's arguments see a GPU, and everybody else the CPU
    major, minor = torch.cuda.get_device_capability()
    if major < 10:
        raise UserError(
            f"--mhc-overlap={layout.overlap} with --tensor-model-parallel-size={layout.tensor} and "
            f"--context-parallel-size={layout.context}: on this GPU (compute capability "
            f"{major}.{minor}, below 10) Megatron's loop takes these only with "
            "CUDA_DEVICE_MAX_CONNECTIONS=1, and an overlap needs 8 or more; use mhc-megatron "
            "train, or --mhc-overlap=none"
        )
