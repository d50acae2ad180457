"""Which schedule a run's pipeline follows, and who runs it.

Bidirectional DualPipe on P ranks is, to Megatron, a pipeline of P/2 ranks and twice the
data-parallel replicas: ranks r and P - 1 - r hold the same two stages and are each other's
replicas. Megatron then adds up their gradients, counts them once in the gradient norm, saves them
once and shards the distributed optimizer's state over both, as it does for all replicas. What it
does not see is that a micro-batch crosses from one replica to the other in the middle of the model:
that is the schedule's.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from mhc_megatron.config import Backend
from mhc_megatron.launch.environment import expect_messages_in_order
from mhc_megatron.megatron.p2p import stream_p2p
from mhc_megatron.megatron.schedule import ForwardBackward
from mhc_megatron.megatron.step_graph import StepGraph
from mhc_megatron.message_blocks import MessageBlocks
from mhc_megatron.pipeline.catalogue import generate
from mhc_megatron.pipeline.distributed import DistributedTransport
from mhc_megatron.pipeline.fp8_transport import FP8Transport
from mhc_megatron.pipeline.measure import Spans
from mhc_megatron.pipeline.recompute import place_recompute
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.stopwatch import stopwatch
from mhc_megatron.pipeline.transport import Transport
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.layout import ParallelConfig

ForwardBackwardFunction = Callable[..., list[Any]]


def pipeline_schedule(config: TrainConfig) -> Schedule:
    """The schedule of a run whose ``parallel.schedule`` is not ``megatron``."""
    return layout_schedule(
        config.parallel,
        num_mb=config.num_micro_batches,
        rebuilds=config.model.residual == "mhc" and config.mhc.recompute != "none",
    )


def layout_schedule(layout: ParallelConfig, *, num_mb: int, rebuilds: bool) -> Schedule:
    """The schedule of ``layout``.

    Args:
        layout: its schedule is not ``megatron``.
        num_mb: micro-batches of a step.
        rebuilds: the hyper-connections rebuild what they dropped, which is an action of its own.
    """
    schedule = generate(layout.schedule, num_ranks=layout.pipeline, num_mb=num_mb)
    ahead = layout.overlap in ("recompute", "all")
    return place_recompute(schedule, in_overlaps=not ahead) if rebuilds else schedule


def data_rank(config: TrainConfig) -> int:
    """This process's share of the global batch, below ``parallel.data``."""
    return parallel_state.get_data_parallel_rank() % config.parallel.data


def pipeline_ranks(config: TrainConfig) -> list[int]:
    """Global ranks of this process's pipeline in the order of its schedule.

    Called by all processes together. Under bidirectional DualPipe the second half is Megatron's
    pipeline ``parallel.data`` replicas further on, backwards: with that distance, and not the
    next replica, expert-parallel groups stay within one half, whose ranks run the same
    micro-batches at the same time.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    ranks: list[int] = torch.distributed.get_process_group_ranks(group)
    if config.parallel.num_copies == 1:
        return ranks
    replicas = parallel_state.get_data_parallel_group()
    halves: list[list[int]] = [[]] * torch.distributed.get_world_size(replicas)
    torch.distributed.all_gather_object(halves, ranks, group=replicas)
    first = data_rank(config)
    return halves[first] + halves[first + config.parallel.data][::-1]


def forward_backward_func(
    config: TrainConfig, megatron_config: TransformerConfig
) -> ForwardBackwardFunction:
    """What runs a step's forwards and backwards, with Megatron's keywords.

    Made once for a run, by all ranks together: a schedule of ours connects its neighbours here.

    Returns:
        Megatron's own function, with p2p of n streams where they cross ranks, or a
        ``ForwardBackward``; with ``cuda_graph`` a ``StepGraph`` of one of them.
    """
    function = _eager_function(config, megatron_config)
    return StepGraph(function) if config.cuda_graph else function


def executor_of(function: ForwardBackwardFunction) -> ForwardBackward | None:
    """What executes a schedule of ours, in a graph or not; None under Megatron's schedules."""
    inner = function.function if isinstance(function, StepGraph) else function
    return inner if isinstance(inner, ForwardBackward) else None


def _eager_function(
    config: TrainConfig, megatron_config: TransformerConfig
) -> ForwardBackwardFunction:
    if config.parallel.schedule != "megatron":
        return connected_step(
            config.parallel,
            pipeline_schedule(config),
            pipeline_ranks(config),
            hidden_parts=config.hidden_parts,
            backend=config.mhc.backend if config.model.residual == "mhc" else "auto",
            timeout=timedelta(minutes=config.timeout_minutes),
        )
    function = get_forward_backward_func()
    if config.hidden_parts > 1 and config.parallel.pipeline > 1:
        return partial(function, **stream_p2p(megatron_config, config.mhc))
    return function


def connected_step(
    layout: ParallelConfig,
    schedule: Schedule,
    ranks: Sequence[int],
    *,
    hidden_parts: int,
    backend: Backend,
    timeout: timedelta,
) -> ForwardBackward:
    """Steps of ``schedule`` between processes; made by all of them together.

    Args:
        layout: what the schedule's messages and Overlaps are.
        schedule: from ``layout_schedule``.
        ranks: as for ``DistributedTransport``.
        hidden_parts: as for ``ForwardBackward``.
        backend: of the kernels that round messages.
        timeout: of a message.
    """
    expect_messages_in_order()
    transport: Transport = DistributedTransport(schedule, ranks, device=_device(), timeout=timeout)
    if layout.messages == "fp8":
        transport = FP8Transport(transport, MessageBlocks(backend))
    return ForwardBackward(schedule, transport, hidden_parts=hidden_parts, overlap=layout.overlap)


@contextlib.contextmanager
def measured(
    config: TrainConfig, function: ForwardBackwardFunction, *, enabled: bool
) -> Iterator[list[Spans]]:
    """Measure every action of the steps inside, if ``function`` is a ForwardBackward.

    In a graph there are no actions any more, and nothing is measured.

    Entered and left by all processes together.

    Yields:
        A list that holds, after the context has closed, the spans of every rank of this process's
        pipeline. Each rank's zero is its own clock right after a barrier.
    """
    spans: list[Spans] = []
    if not enabled or not isinstance(function, ForwardBackward):
        yield spans
        return
    torch.distributed.barrier()
    function.stopwatch = stopwatch(_device())
    try:
        yield spans
    finally:
        watch, function.stopwatch = function.stopwatch, None
    # A bidirectional pipeline is no process group of Megatron's: every process sends its spans.
    found: list[Spans] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, watch.spans())
    spans.extend(found[rank] for rank in pipeline_ranks(config))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
