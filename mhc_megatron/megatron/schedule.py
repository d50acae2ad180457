"""Any schedule in the place of Megatron's forward_backward_func."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import forward_step
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from mhc_megatron.errors import UserError
from mhc_megatron.megatron.chain import stream_recompute
from mhc_megatron.pipeline.executor import ExecutionError, execute
from mhc_megatron.pipeline.lower import Program, lower_rank
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.stage import AutogradStage
from mhc_megatron.pipeline.stopwatch import Stopwatch
from mhc_megatron.pipeline.transport import Message, Transport
from mhc_megatron.pipeline.validate import validate
from mhc_megatron.recompute import ForwardRecompute


class ForwardBackward:
    """A step of ``schedule``, called as Megatron's forward_backward_func is.

    Args:
        schedule: any that ``validate`` accepts, one copy of each stage.
        transport: to the neighbours; made once, for all steps.
        num_streams: n of the hyper-connections, 1 for the plain residual: messages are
            [s, b, n*C].

    Attributes:
        stopwatch: measures the actions of the steps while it is set.

    Raises:
        ScheduleError: the schedule is not valid.
        UserError: bidirectional DualPipe, whose second copies of the parameters would have to be
            reduced, counted once and saved once.
    """

    def __init__(self, schedule: Schedule, transport: Transport, *, num_streams: int = 1) -> None:
        validate(schedule)
        if schedule.placement.mirrored_from is not None:
            raise UserError(
                f"{schedule.name} keeps two copies of every parameter, which this executor does "
                "not reduce; use dualpipe_v"
            )
        self.schedule, self.transport, self.num_streams = schedule, transport, num_streams
        self.stopwatch: Stopwatch | None = None
        self._programs: dict[bool, Program] = {}

    def __call__(
        self,
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: Iterator[Any] | list[Iterator[Any]],
        model: torch.nn.Module | list[torch.nn.Module],
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
        decoder_seq_length: int | None = None,
        forward_only: bool = False,
        collect_non_loss_data: bool = False,
        first_val_step: bool | None = None,
        adjust_tensor_shapes_fn: Callable[..., Any] | None = None,
        p2p_communicator: Any = None,
        pg_collection: ProcessGroupCollection | None = None,
        force_all_reduce: bool = False,
    ) -> list[Any]:
        """Forward and backward of all micro-batches, then ``finalize_model_grads_func``.

        Args:
            model: this rank's chunks in the order of their stages, each with an entry of
                ``data_iterator``; built with ``stage_place``.
            The others are Megatron's.

        Returns:
            What the loss function reports, per micro-batch, on the rank of the last stage; empty
            on the others.

        Raises:
            UserError: an argument or option that this schedule cannot honour.
            ExecutionError: an action or a message failed, with its rank.
        """
        chunks = model if isinstance(model, list) else [model]
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        config = get_model_config(chunks[0])
        stages = self.schedule.placement.stages_on(self.transport.rank)
        refuse_arguments(
            decoder_seq_length=decoder_seq_length not in (None, seq_length),
            adjust_tensor_shapes_fn=adjust_tensor_shapes_fn is not None,
            p2p_communicator=p2p_communicator is not None,
        )
        self._check(config, chunks, stages, num_microbatches)
        step = _Step(
            forward_step_func=forward_step_func,
            config=config,
            num_microbatches=num_microbatches,
            num_stages=self.schedule.num_stages,
            forward_only=forward_only,
            collect_non_loss_data=collect_non_loss_data,
            first_val_step=first_val_step,
        )
        with contextlib.ExitStack() as stack:
            if forward_only:
                stack.enter_context(torch.no_grad())
            else:
                for no_sync in _no_sync(config):
                    stack.enter_context(no_sync())
            try:
                execute(
                    self._program(forward_only),
                    {
                        stage: step.stage(stage, chunk, iterator)
                        for stage, chunk, iterator in zip(stages, chunks, iterators, strict=True)
                    },
                    self.transport,
                    num_stages=self.schedule.num_stages,
                    message=self._message(config, seq_length, micro_batch_size),
                    stopwatch=self.stopwatch,
                )
            except ExecutionError as error:
                if isinstance(error.__cause__, UserError):
                    raise error.__cause__ from None
                raise
        if not forward_only and config.finalize_model_grads_func is not None:
            self._finalize(config, chunks, step.num_tokens, pg_collection, force_all_reduce)
        return step.reports

    def _program(self, forward_only: bool) -> Program:
        if forward_only not in self._programs:
            rank = self.transport.rank
            self._programs[forward_only] = lower_rank(
                self.schedule, rank, forward_only=forward_only
            )
        return self._programs[forward_only]

    def _message(
        self, config: TransformerConfig, seq_length: int, micro_batch_size: int
    ) -> Message:
        local = seq_length // parallel_state.get_context_parallel_world_size()
        if config.sequence_parallel:
            local //= parallel_state.get_tensor_model_parallel_world_size()
        current = torch.cuda.current_device()
        return Message(
            shape=(local, micro_batch_size, config.hidden_size * self.num_streams),
            dtype=config.pipeline_dtype or config.params_dtype,
            device=torch.device("cuda", current) if isinstance(current, int) else current,
        )

    def _check(
        self,
        config: TransformerConfig,
        chunks: list[torch.nn.Module],
        stages: tuple[int, ...],
        num_microbatches: int,
    ) -> None:
        name = self.schedule.name
        if num_microbatches != self.schedule.num_mb:
            raise UserError(
                f"num_microbatches={num_microbatches}, but {name} was made for "
                f"{self.schedule.num_mb}; make another schedule"
            )
        if config.pipeline_model_parallel_size != self.schedule.num_stages:
            raise UserError(
                f"the chunks are built for {config.pipeline_model_parallel_size} stages, {name} "
                f"has {self.schedule.num_stages}; set pipeline_model_parallel_size to that"
            )
        assert len(chunks) == len(stages), f"{len(chunks)} chunks for stages {stages}"
        for option, reason in (
            ("variable_seq_lengths", "every message has one shape"),
            ("num_microbatches_with_partial_activation_checkpoints", "all are treated alike"),
            ("overlap_moe_expert_parallel_comm", "it has a schedule of its own"),
            ("grad_sync_func", "gradients are reduced after the step: set overlap_grad_reduce off"),
        ):
            if getattr(config, option, None):
                raise UserError(f"{option} does not combine with {name}: {reason}")
        for chunk in chunks:
            if get_attr_wrapped_model(chunk, "share_embeddings_and_output_weights"):
                raise UserError(
                    f"tied embeddings under {name}: the first and the last stage hold copies whose "
                    "gradients Megatron adds between the first and the last rank only; set "
                    "share_embeddings_and_output_weights=False"
                )

    def _finalize(
        self,
        config: TransformerConfig,
        chunks: list[torch.nn.Module],
        num_tokens: Tensor,
        pg_collection: ProcessGroupCollection | None,
        force_all_reduce: bool,
    ) -> None:
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        tokens = None
        if config.calculate_per_token_loss:
            # Megatron broadcasts the last rank's count, and here another rank may have the loss.
            tokens = num_tokens.to(torch.cuda.current_device())
            torch.distributed.all_reduce(tokens, group=groups.pp)
        config.finalize_model_grads_func(
            chunks, tokens, pg_collection=groups, force_all_reduce=force_all_reduce
        )


class _Step:
    """What the stages of one step share."""

    def __init__(
        self,
        *,
        forward_step_func: Callable[..., Any],
        config: TransformerConfig,
        num_microbatches: int,
        num_stages: int,
        forward_only: bool,
        collect_non_loss_data: bool,
        first_val_step: bool | None,
    ) -> None:
        self.reports: list[Any] = []
        self.num_tokens = torch.zeros((), dtype=torch.int)
        self._forward_step_func, self._config = forward_step_func, config
        self._num_microbatches, self._num_stages = num_microbatches, num_stages
        self._forward_only, self._collect = forward_only, collect_non_loss_data
        self._may_be_first = first_val_step is None or not forward_only or first_val_step

    def stage(self, stage: int, chunk: torch.nn.Module, data: Iterator[Any]) -> AutogradStage:
        """A chunk as a stage; micro-batches come in the order of ``data``."""
        is_last = stage == self._num_stages - 1
        recompute = stream_recompute(chunk)
        dropped: dict[int, ForwardRecompute] = {}
        taken = 0

        def forward(mb: int, x: Tensor | None) -> Tensor:
            nonlocal taken
            assert mb == taken, f"stage {stage} takes micro-batch {mb} instead of {taken}"
            taken += 1
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
                is_first_microbatch=self._may_be_first and mb == 0,
                current_microbatch=mb,
                is_last_stage=is_last,
            )
            if recompute is not None and not self._forward_only:
                dropped[mb] = recompute.take()
            if is_last:
                self.num_tokens = self.num_tokens + num_tokens
                if self._config.grad_scale_func is not None and not self._forward_only:
                    output = self._config.grad_scale_func(output)
            return output

        def rebuild(mb: int) -> None:
            if mb in dropped:
                dropped.pop(mb).rebuild()

        return AutogradStage(forward, rebuild=rebuild, name=f"stage {stage}")


def refuse_arguments(**given: bool) -> None:
    """Raise a UserError for the first argument that is given."""
    for name, is_given in given.items():
        if is_given:
            raise UserError(
                f"{name} is for Megatron's own pipeline schedules: here the messages' shape and "
                "the transport are the executor's; leave it out"
            )


def _no_sync(config: TransformerConfig) -> list[Callable[[], Any]]:
    functions = config.no_sync_func
    if functions is None:
        return []
    return functions if isinstance(functions, list) else [functions]
