"""Which schedule a run's pipeline follows, and who runs it."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from mhc_megatron.megatron.p2p import stream_p2p
from mhc_megatron.megatron.schedule import ForwardBackward
from mhc_megatron.pipeline.catalogue import generate
from mhc_megatron.pipeline.distributed import DistributedTransport
from mhc_megatron.pipeline.measure import Spans
from mhc_megatron.pipeline.recompute import place_recompute
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.stopwatch import stopwatch
from mhc_megatron.training.config import TrainConfig

ForwardBackwardFunction = Callable[..., list[Any]]


def pipeline_schedule(config: TrainConfig) -> Schedule:
    """The schedule of a run whose ``parallel.schedule`` is not ``megatron``.

    Where the hyper-connections rebuild what they dropped, that is an action of its own.
    """
    layout = config.parallel
    schedule = generate(layout.schedule, num_ranks=layout.pipeline, num_mb=config.num_micro_batches)
    rebuilds = config.model.residual == "mhc" and config.mhc.recompute != "none"
    return place_recompute(schedule) if rebuilds else schedule


def forward_backward_func(
    config: TrainConfig, megatron_config: TransformerConfig
) -> ForwardBackwardFunction:
    """What runs a step's forwards and backwards, with Megatron's keywords.

    Made once for a run, by all ranks together: a schedule of ours connects its neighbours here.

    Returns:
        Megatron's own function, with p2p of n streams where they cross ranks, or a
        ``ForwardBackward``.
    """
    num_streams = config.mhc.num_streams if config.model.residual == "mhc" else 1
    if config.parallel.schedule != "megatron":
        group = parallel_state.get_pipeline_model_parallel_group()
        schedule = pipeline_schedule(config)
        transport = DistributedTransport(
            schedule,
            torch.distributed.get_process_group_ranks(group),
            device=_device(),
        )
        return ForwardBackward(schedule, transport, num_streams=num_streams)
    function = get_forward_backward_func()
    if num_streams > 1 and config.parallel.pipeline > 1:
        return partial(function, **stream_p2p(megatron_config, config.mhc))
    return function


@contextlib.contextmanager
def measured(function: ForwardBackwardFunction, *, enabled: bool) -> Iterator[list[Spans]]:
    """Measure every action of the steps inside, if ``function`` is a ForwardBackward.

    Yields:
        A list that holds, after the context has closed, the spans of every rank of this process's
        pipeline. Each rank's zero is its own clock right after a barrier.
    """
    spans: list[Spans] = []
    if not enabled or not isinstance(function, ForwardBackward):
        yield spans
        return
    group = parallel_state.get_pipeline_model_parallel_group()
    torch.distributed.barrier(group=group)
    function.stopwatch = stopwatch(_device())
    try:
        yield spans
    finally:
        watch, function.stopwatch = function.stopwatch, None
    found: list[Spans] = [[]] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(found, watch.spans(), group=group)
    spans.extend(found)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
