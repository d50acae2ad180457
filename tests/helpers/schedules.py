"""Schedules and costs for property tests, and a slow simulator to compare with."""

from functools import cache

from hypothesis import strategies as st

from mhc_megatron.pipeline.actions import Action, Compute, Op, parts
from mhc_megatron.pipeline.catalogue import generate
from mhc_megatron.pipeline.costs import Costs, StageCosts
from mhc_megatron.pipeline.recompute import place_recompute
from mhc_megatron.pipeline.schedule import Schedule


@st.composite
def schedules(draw: st.DrawFn, max_ranks: int = 6) -> Schedule:
    """Any generated schedule, with or without rebuilds."""
    name = draw(
        st.sampled_from(["gpipe", "one_f_one_b", "interleaved", "zb_h1", "dualpipe_v", "dualpipe"])
    )
    num_ranks = draw(st.integers(1, max_ranks))
    num_chunks = None
    if name in ("dualpipe_v", "dualpipe"):
        num_ranks += num_ranks % 2 if name == "dualpipe" else 0
        num_mb = 2 * num_ranks + draw(st.integers(0, 6))
        num_mb += num_mb % 2 if name == "dualpipe" else 0
    elif name == "interleaved":
        num_mb = num_ranks * draw(st.integers(1, 3))
        num_chunks = draw(st.integers(1, 3))
    else:
        num_mb = draw(st.integers(1, 12))
    schedule = generate(name, num_ranks=num_ranks, num_mb=num_mb, num_chunks=num_chunks)
    return place_recompute(schedule) if draw(st.booleans()) else schedule


@st.composite
def costs(draw: st.DrawFn, num_stages: int) -> Costs:
    """Integer costs, different for every stage, zeros included."""
    times = st.integers(0, 9)
    optional = st.none() | times
    stages = {
        stage: StageCosts(
            forward=draw(times),
            dgrad=draw(times),
            wgrad=draw(times),
            backward=draw(optional),
            overlap=draw(optional),
            recompute=draw(times),
        )
        for stage in range(num_stages)
    }
    return Costs(stages=stages, latency=draw(times))


def slow_ends(schedule: Schedule, costs: Costs) -> list[list[int]]:
    """End of every action of every rank, straight from the definition, by recursion."""
    stages = costs.of_stages(schedule.num_stages)
    rows = [list(row) for row in schedule.ranks]
    place = {
        compute: (rank, index)
        for rank, row in enumerate(rows)
        for index, action in enumerate(row)
        for compute in parts(action)
    }

    def backward_of(stage: int, mb: int) -> Compute:
        whole = Compute(Op.B, stage, mb)
        return whole if whole in place else Compute(Op.I, stage, mb)

    def needs(compute: Compute) -> list[Compute]:
        op, stage, mb = compute.op, compute.stage, compute.mb
        if op is Op.F:
            return [Compute(Op.F, stage - 1, mb)] if stage else []
        if op is Op.W:
            return [Compute(Op.I, stage, mb)]
        own = [Compute(Op.F, stage, mb)]
        if op is Op.R:
            return own
        own += [c for c in [Compute(Op.R, stage, mb)] if c in place]
        return own + ([backward_of(stage + 1, mb)] if stage + 1 < schedule.num_stages else [])

    def duration(action: Action) -> int:
        total = 0
        for compute in parts(action):
            own = stages[compute.stage]
            if compute.op in (Op.B, Op.I) and Compute(Op.R, compute.stage, compute.mb) not in place:
                total += own.recompute
            total += {
                Op.F: own.forward,
                Op.B: own.whole_backward,
                Op.I: own.dgrad,
                Op.W: own.wgrad,
                Op.R: own.recompute,
            }[compute.op]
        if len(parts(action)) == 2:
            fwd, bwd = parts(action)
            own = stages[bwd.stage]
            if own.overlap is not None:
                total += own.overlap - stages[fwd.stage].forward - own.whole_backward
        return total

    @cache
    def end(rank: int, index: int) -> int:
        begin = end(rank, index - 1) if index else 0
        for compute in parts(rows[rank][index]):
            for need in needs(compute):
                other, position = place[need]
                begin = max(begin, end(other, position) + (costs.latency if other != rank else 0))
        return begin + duration(rows[rank][index])

    return [[end(rank, index) for index in range(len(row))] for rank, row in enumerate(rows)]
