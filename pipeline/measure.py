"""What an executed step took: spans of every action, as a timeline and as costs."""

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from mhc_megatron.pipeline.actions import Compute, Op, parts
from mhc_megatron.pipeline.costs import Costs, StageCosts
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.simulate import simulate
from mhc_megatron.pipeline.timeline import Timeline

# Start and end of a rank's actions, in seconds since its own zero.
Spans = list[tuple[float, float]]


class Stopwatch(Protocol):
    """Notes when each action of a rank starts and ends."""

    def start(self) -> None:
        """An action starts."""
        ...

    def stop(self) -> None:
        """It has ended."""
        ...

    def spans(self) -> Spans:
        """All actions so far, in seconds since the stopwatch was made."""
        ...


class HostStopwatch:
    """Times of the host: for the CPU, whose work is done when a call returns."""

    def __init__(self) -> None:
        self._zero = time.perf_counter()
        self._times: list[float] = []

    def start(self) -> None:
        """As in ``Stopwatch``."""
        self._times.append(time.perf_counter())

    stop = start

    def spans(self) -> Spans:
        """As in ``Stopwatch``."""
        since = [at - self._zero for at in self._times]
        return list(zip(since[::2], since[1::2], strict=True))


class CudaStopwatch:
    """Times of the GPU: events on the current stream, read when ``spans`` is called."""

    def __init__(self) -> None:
        self._zero = self._now()
        self._events: list[Any] = []

    @staticmethod
    def _now() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """As in ``Stopwatch``."""
        self._events.append(self._now())

    stop = start

    def spans(self) -> Spans:
        """As in ``Stopwatch``; waits for the GPU."""
        torch.cuda.synchronize()
        since = [self._zero.elapsed_time(event) / 1e3 for event in self._events]
        return list(zip(since[::2], since[1::2], strict=True))


def stopwatch(device: torch.device) -> HostStopwatch | CudaStopwatch:
    """A stopwatch for work on ``device``; all ranks make theirs at one time, after a barrier."""
    return CudaStopwatch() if device.type == "cuda" else HostStopwatch()


def timeline_of(schedule: Schedule, spans: Sequence[Spans]) -> Timeline:
    """The executed timeline, in ms from the start of the first action of all.

    Args:
        schedule: what ran.
        spans: of every rank, one per action.
    """
    counts = [len(row) for row in schedule.ranks]
    assert counts == [len(rank) for rank in spans], "one span per action of the schedule"
    times = 1e3 * np.array([span for rank in spans for span in rank])
    times -= times.min()
    on_paper = simulate(schedule)  # for what depends on the order alone
    return Timeline(
        schedule=schedule,
        unit="ms",
        first_action=on_paper.first_action,
        start=times[:, 0],
        end=times[:, 1],
        peak_live=on_paper.peak_live,
        peak_bytes=on_paper.peak_bytes,
    )


def costs_of(timeline: Timeline) -> Costs:
    """Costs per stage and operation: the medians of an executed timeline.

    A stage without a backward of its own kind, B or I and W, gets it from the other kind; overlaps
    are costed by the stage of their backward, as the simulator does.
    """
    spent: dict[tuple[int, str], list[float]] = defaultdict(list)
    for rank in range(timeline.schedule.num_ranks):
        for span in timeline.spans(rank):
            action, length = span.action, float(span.end - span.start)
            name = action.op.value if isinstance(action, Compute) else "overlap"
            spent[parts(action)[-1].stage, name].append(length)
    median = {key: statistics.median(lengths) for key, lengths in spent.items()}
    stages = {}
    for stage in range(timeline.schedule.num_stages):
        whole, dgrad = median.get((stage, Op.B.value)), median.get((stage, Op.I.value))
        overlap = median.get((stage, "overlap"))
        forward = median.get((stage, Op.F.value), 0.0)
        if whole is None and dgrad is None and overlap is not None:
            whole = max(0.0, overlap - forward)
        stages[stage] = StageCosts(
            forward=forward,
            dgrad=dgrad if dgrad is not None else whole or 0.0,
            wgrad=median.get((stage, Op.W.value), 0.0),
            backward=whole,
            overlap=overlap,
            recompute=median.get((stage, Op.R.value), 0.0),
        )
    return Costs(stages=stages, unit=timeline.unit)
