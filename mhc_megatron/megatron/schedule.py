"""Any schedule in the place of Megatron's forward_backward_func."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from mhc_megatron.errors import UserError
from mhc_megatron.launch.environment import cuda_connections
from mhc_megatron.megatron.chunk_phases import mark_phases
from mhc_megatron.megatron.chunk_stages import ChunkStages
from mhc_megatron.megatron.delayed_wgrad import QueuedWeightGrads
from mhc_megatron.megatron.overlap import LaneOverlap
from mhc_megatron.megatron.phases import Lanes
from mhc_megatron.pipeline.actions import Overlap
from mhc_megatron.pipeline.executor import ExecutionError, Progress, execute
from mhc_megatron.pipeline.lower import Program, lower_rank
from mhc_megatron.pipeline.phases import OverlapMode
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.stopwatch import Stopwatch
from mhc_megatron.pipeline.transport import Message, Transport
from mhc_megatron.pipeline.validate import validate

# CUDA's own default.
_LEAST_QUEUES = 8


class ForwardBackward:
    """A step of ``schedule``, called as Megatron's forward_backward_func is.

    A schedule with two copies of each stage, bidirectional DualPipe, asks that the two ranks that
    hold a stage are data-parallel replicas to Megatron, which then reduces their gradients, counts
    them once and saves them once: initialise its pipeline with half of the schedule's ranks. Both
    halves get the same micro-batches.

    Args:
        schedule: any that ``validate`` accepts.
        transport: to the neighbours; made once, for all steps.
        hidden_parts: of ``MHCConfig``, 1 for the plain residual: messages are
            [s, b, hidden_parts*C].
        overlap: what the schedule's Overlaps do.

    Attributes:
        stopwatch: measures the actions of the steps while it is set.
        progress: told of every item that begins, if it is set (``execute``).

    Raises:
        ScheduleError: the schedule is not valid.
        UserError: two copies of each stage that are not replicas to Megatron, or ``overlap`` of a
            schedule without Overlaps.
    """

    def __init__(
        self,
        schedule: Schedule,
        transport: Transport,
        *,
        hidden_parts: int = 1,
        overlap: OverlapMode = "none",
    ) -> None:
        validate(schedule)
        _check_copies(schedule)
        self.schedule, self.transport, self.hidden_parts = schedule, transport, hidden_parts
        self.stopwatch: Stopwatch | None = None
        self.progress: Progress | None = None
        self._programs: dict[bool, Program] = {}
        self._has_run = False
        self._mode = overlap
        self._lanes: Lanes | None = None
        self._overlap: LaneOverlap | None = None
        if overlap != "none":
            check_overlap(schedule, overlap)

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
                ``data_iterator``, which yields all micro-batches of the step, also where the chunk
                computes half of them; built with ``stage_place``.
            The others are Megatron's.

        Returns:
            What the loss function reports, per micro-batch, on the ranks of the last stage; empty
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
        if self._mode != "none":
            self._mark(chunks, stages)
        step = ChunkStages(
            forward_step_func=forward_step_func,
            config=config,
            schedule=self.schedule,
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
                    overlap=self._overlap,
                    first=not self._has_run,
                    stopwatch=self.stopwatch,
                    progress=self.progress,
                )
            except ExecutionError as error:
                if isinstance(error.__cause__, UserError):
                    raise error.__cause__ from None
                raise
        self._has_run |= not forward_only
        step.skip_what_others_took()
        if not forward_only and config.finalize_model_grads_func is not None:
            self._finalize(config, chunks, step.num_tokens, pg_collection, force_all_reduce)
        return step.reports

    def _mark(self, chunks: list[torch.nn.Module], stages: tuple[int, ...]) -> None:
        if self._lanes is not None:
            return
        current = torch.cuda.current_device()
        on_gpu = isinstance(current, int)
        self._lanes = Lanes(torch.device("cuda", current) if on_gpu else torch.device("cpu"))
        self._overlap = LaneOverlap(self._lanes)
        for stage, chunk in zip(stages, chunks, strict=True):
            ends_model = stage == self.schedule.num_stages - 1
            mark_phases(chunk, self._lanes, self._mode, ends_model=ends_model)

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
            shape=(local, micro_batch_size, config.hidden_size * self.hidden_parts),
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
        balancing = config.moe_router_load_balancing_type
        if self.schedule.placement.num_copies > 1 and "global_aux_loss" in balancing:
            raise UserError(
                f"moe_router_load_balancing_type={balancing!r} does not combine with {name}: the "
                "router adds up counts over replicas in its forward, and two copies of a stage run "
                "at different times; use aux_loss or seq_aux_loss"
            )
        for chunk in chunks:
            _check_delayed(chunk)
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
            tokens = num_tokens.clone()
            torch.distributed.all_reduce(tokens, group=groups.pp)
        config.finalize_model_grads_func(
            chunks, tokens, pg_collection=groups, force_all_reduce=force_all_reduce
        )


def check_overlap(schedule: Schedule, mode: OverlapMode) -> None:
    """Raise a UserError if nothing in the schedule, or in the process, can be interleaved."""
    where = f"parallel.overlap={mode!r}"
    if not any(isinstance(action, Overlap) for row in schedule.ranks for action in row):
        raise UserError(
            f"{where}: {schedule.name} has no Overlap to interleave; use dualpipe_v or dualpipe, "
            "or parallel.overlap='none'"
        )
    connections = cuda_connections() or str(_LEAST_QUEUES)
    enough = connections.isdigit() and int(connections) >= _LEAST_QUEUES
    if torch.cuda.is_available() and not enough:
        raise UserError(
            f"{where} with CUDA_DEVICE_MAX_CONNECTIONS={connections}: the lanes would share the "
            f"GPU's hardware queues and wait for each other; set it to {_LEAST_QUEUES} or more "
            "(32 is the most), or parallel.overlap='none'"
        )


def _check_copies(schedule: Schedule) -> None:
    copies = schedule.placement.num_copies
    found = parallel_state.get_pipeline_model_parallel_world_size()
    if copies > 1 and found * copies != schedule.num_ranks:
        raise UserError(
            f"{schedule.name} holds every stage on {copies} of its {schedule.num_ranks} ranks, "
            f"which have to be data-parallel replicas, but Megatron's pipeline has {found} ranks; "
            f"initialise it with pipeline_model_parallel_size={schedule.num_ranks // copies}"
        )


def _check_delayed(chunk: torch.nn.Module) -> None:
    """Megatron's DDP adds up a queued weight gradient only if it is told that there are some."""
    ddp_config = getattr(chunk, "ddp_config", None)
    if ddp_config is None or ddp_config.delay_wgrad_compute or not QueuedWeightGrads(chunk):
        return
    raise UserError(
        "the chunks delay weight gradients (delay_wgrad_compute), and their "
        "DistributedDataParallel would not add them up; set "
        "DistributedDataParallelConfig(delay_wgrad_compute=True)"
    )


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
