"""An executed step as a timeline, and as costs for the simulator."""

import statistics
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from mhc_megatron.pipeline.actions import Compute, Op, parts
from mhc_megatron.pipeline.costs import Costs, StageCosts
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.simulate import simulate
from mhc_megatron.pipeline.timeline import Timeline

# Start and end of a rank's actions, in seconds since its own zero.
Spans = list[tuple[float, float]]


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
