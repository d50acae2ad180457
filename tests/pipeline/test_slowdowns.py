"""Lanes that slow each other down, in exact fractions: closed formulas, all work done, bounds."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_megatron.pipeline.errors import ScheduleError
from mhc_megatron.pipeline.forecast import forecast, phase_costs_from_json
from mhc_megatron.pipeline.interleave import ESTIMATED_COSTS, PhaseCost, interleave
from mhc_megatron.pipeline.lanes import NO_SLOWDOWNS, Slowdowns, Span, simulate_lanes
from mhc_megatron.pipeline.phases import Lane, Phase, Plan, Step, stage_phases

PAIRS = list(itertools.permutations(Lane, 2))
LENGTHS = st.integers(0, 5).map(Fraction)
FACTORS = st.fractions(1, 3, max_denominator=6)
ROW = stage_phases([True, False], "all", block_ends={1, 3}, loss=False)


def by_rule_of_plain_lanes(plan: Plan, costs: dict[str, PhaseCost]) -> list[tuple[float, float]]:
    """Start and end of every step of a plan of ``ROW``, if nothing is slowed down."""
    free: dict[Lane, float] = dict.fromkeys(Lane, 0)
    chain: dict[str, float] = {"F": 0, "B": 0}
    ends: dict[Step, float] = {}
    found = []
    for step in plan:
        phase, cost = ROW[step.phase], costs[ROW[step.phase].name]
        lane = {"R": Lane.PRIORITY, "W": Lane.COMPUTE}.get(step.op, phase.lane)
        ready = chain.get(step.op, 0)
        if step.op == "W":
            ready = ends[Step("B", step.phase)]
        if step.op == "B":
            ready = max(ready, ends.get(Step("R", step.phase), 0))
        start = max(free[lane], ready)
        length = {"F": cost.forward, "B": cost.dgrad, "W": cost.wgrad, "R": cost.rebuild}[step.op]
        free[lane] = ends[step] = start + length
        if step.op in chain:
            chain[step.op] = start + length
        found.append((start, start + length))
    return found


@st.composite
def exact_costs(draw: st.DrawFn) -> dict[str, PhaseCost]:
    return {name: PhaseCost(*(draw(LENGTHS) for _ in range(4))) for name in ESTIMATED_COSTS}


@st.composite
def random_slowdowns(draw: st.DrawFn) -> Slowdowns:
    return Slowdowns({pair: draw(FACTORS) for pair in PAIRS if draw(st.booleans())})


@settings(max_examples=100, deadline=None)
@given(data=st.data(), rebuild=st.booleans())
def test_without_slowdowns_lanes_are_plain(data: st.DataObject, rebuild: bool) -> None:
    """To the last bit: tenths have no exact sums."""
    tenths = st.integers(0, 50).map(lambda number: number / 10)
    costs = {name: PhaseCost(*(data.draw(tenths) for _ in range(4))) for name in ESTIMATED_COSTS}
    plan = interleave(ROW, ROW, costs, rebuild=rebuild)
    for slowdowns in (NO_SLOWDOWNS, Slowdowns(dict.fromkeys(PAIRS, 1.0))):
        spans = simulate_lanes(plan, ROW, ROW, costs, slowdowns)
        assert [(span.start, span.end) for span in spans] == by_rule_of_plain_lanes(plan, costs)
        assert [span.step for span in spans] == list(plan)


def test_whole_numbers_stay_whole() -> None:
    costs = {name: PhaseCost(3, 2, 1, 1) for name in ESTIMATED_COSTS}
    spans = simulate_lanes(interleave(ROW, ROW, costs, rebuild=True), ROW, ROW, costs)
    assert all(type(time) is int for span in spans for time in (span.start, span.end))


@settings(max_examples=200, deadline=None)
@given(a=LENGTHS, b=LENGTHS, s=FACTORS, t=FACTORS)
def test_two_steps_side_by_side(a: Fraction, b: Fraction, s: Fraction, t: Fraction) -> None:
    """Closed form: the first to end takes its factor times its length, the other is then alone."""
    product, exchange = (Phase("a"),), (Phase("b", Lane.COMMUNICATION),)
    costs = {"a": PhaseCost(a, a), "b": PhaseCost(b, b)}
    pair = (Lane.COMPUTE, Lane.COMMUNICATION)
    slowdowns = Slowdowns({pair: s, pair[::-1]: t})
    plan = (Step("F", 0), Step("B", 0))
    first, second = simulate_lanes(plan, product, exchange, costs, slowdowns)
    if a * s <= b * t:
        assert (first.end, second.end) == (a * s, b + a * s - a * s / t)
    else:
        assert (second.end, first.end) == (b * t, a + b * t - b * t / s)
    assert (first.start, second.start) == (0, 0)


def test_three_lanes_at_once_multiply() -> None:
    """A product beside an exchange and a rebuild, both longer than it."""
    forward = (Phase("a"),)
    backward = (Phase("p", begins_block=True), Phase("x", Lane.COMMUNICATION))
    costs = {"a": PhaseCost(2, 0), "x": PhaseCost(0, 60), "p": PhaseCost(0, 1, 0, 50)}
    beside = {(Lane.COMPUTE, Lane.PRIORITY): 3, (Lane.COMPUTE, Lane.COMMUNICATION): 2}
    plan = (Step("R", 0), Step("B", 1), Step("F", 0), Step("B", 0))
    spans = simulate_lanes(plan, forward, backward, costs, Slowdowns(beside))
    assert [(span.start, span.end) for span in spans] == [(0, 50), (0, 60), (0, 12), (60, 61)]


def work_done(span: Span, spans: tuple[Span, ...], slowdowns: Slowdowns) -> Fraction:
    """Of a step, from what runs beside it between any two moments in which something changes."""
    moments = sorted({time for other in spans for time in (other.start, other.end)})
    done = Fraction(0)
    for start, end in itertools.pairwise(moments):
        if span.start <= start and end <= span.end:
            beside = {
                other.lane
                for other in spans
                if other.lane is not span.lane and other.start <= start and end <= other.end
            }
            done += Fraction(end - start) / Fraction(slowdowns.of(span.lane, beside))
    return done


@settings(max_examples=100, deadline=None)
@given(costs=exact_costs(), slowdowns=random_slowdowns(), rebuild=st.booleans())
def test_all_work_is_done_and_bounds_hold(
    costs: dict[str, PhaseCost], slowdowns: Slowdowns, rebuild: bool
) -> None:
    """No step ends earlier than unslowed, or later than if all were slowed down all of the time."""
    plan = interleave(ROW, ROW, costs, rebuild=rebuild)
    spans = simulate_lanes(plan, ROW, ROW, costs, slowdowns)
    most = max(slowdowns.of(lane, set(Lane) - {lane}) for lane in Lane)
    for span, plain in zip(spans, simulate_lanes(plan, ROW, ROW, costs), strict=True):
        assert plain.end <= span.end <= plain.end * most
        assert plain.start <= span.start
        assert work_done(span, spans, slowdowns) == costs[span.phase.name].of(span.step)
    for lane in Lane:
        own = sorted((span.start, span.end) for span in spans if span.lane is lane)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(own))


@settings(max_examples=100, deadline=None)
@given(a=LENGTHS, b=LENGTHS, s=FACTORS, t=FACTORS, more=FACTORS)
def test_two_steps_end_no_earlier_with_larger_factors(
    a: Fraction, b: Fraction, s: Fraction, t: Fraction, more: Fraction
) -> None:
    product, exchange = (Phase("a"),), (Phase("b", Lane.COMMUNICATION),)
    costs = {"a": PhaseCost(a, a), "b": PhaseCost(b, b)}
    pair = (Lane.COMPUTE, Lane.COMMUNICATION)
    plan = (Step("F", 0), Step("B", 0))

    def ends(first: Fraction, second: Fraction) -> list[float]:
        slowdowns = Slowdowns({pair: first, pair[::-1]: second})
        spans = simulate_lanes(plan, product, exchange, costs, slowdowns)
        return [span.end for span in spans]

    base = ends(s, t)
    for larger in (ends(s * more, t), ends(s, t * more)):
        assert all(after >= before for before, after in zip(base, larger, strict=True))


def test_a_forecast_knows_both_lengths() -> None:
    slowdowns = Slowdowns({(Lane.COMPUTE, Lane.COMMUNICATION): 1.25})
    plain, slowed = forecast(ROW), forecast(ROW, slowdowns=slowdowns)
    assert plain.length == plain.unslowed_length == slowed.unslowed_length < slowed.length
    assert [span.step for span in plain.spans] == [span.step for span in slowed.spans]
    assert (plain.slowdowns, slowed.slowdowns) == (NO_SLOWDOWNS, slowdowns)


def test_slowdowns_of_a_file() -> None:
    text = '{"mlp": {"forward": 2}, "slowdowns": {"compute": {"communication": 1.04}}}'
    costs, slowdowns = phase_costs_from_json(text)
    assert costs == {"mlp": PhaseCost(2, 0.0, 0.0, 0.0)}
    assert slowdowns == Slowdowns({(Lane.COMPUTE, Lane.COMMUNICATION): 1.04})
    assert phase_costs_from_json('{"mlp": {"forward": 2}}')[1] == NO_SLOWDOWNS


@pytest.mark.parametrize("factor", [0.99, 0, -1, math.nan, math.inf])
def test_a_factor_that_is_none(factor: float) -> None:
    with pytest.raises(
        ScheduleError, match=rf"slowdowns\.compute\.priority={factor} must be at least 1, the time"
    ):
        Slowdowns({(Lane.COMPUTE, Lane.PRIORITY): factor})


def test_a_lane_beside_itself() -> None:
    with pytest.raises(ScheduleError, match=r"slowdowns\.priority\.priority: a lane runs one step"):
        Slowdowns({(Lane.PRIORITY, Lane.PRIORITY): 1.5})
