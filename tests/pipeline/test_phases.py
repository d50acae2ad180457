"""Plans of an Overlap: valid, deterministic, as short as the lanes allow where that is known."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_megatron.pipeline.errors import ScheduleError
from mhc_megatron.pipeline.interleave import (
    ESTIMATED_COSTS,
    PhaseCost,
    interleave,
    serial,
)
from mhc_megatron.pipeline.intervals import intersection, length, union
from mhc_megatron.pipeline.lanes import simulate_lanes
from mhc_megatron.pipeline.phases import (
    Collectives,
    Lane,
    Phase,
    Step,
    check_plan,
    stage_phases,
)

MODES = ["post", "recompute", "all"]


@st.composite
def stages(draw: st.DrawFn) -> tuple[Phase, ...]:
    layers = draw(st.lists(st.booleans(), min_size=1, max_size=4))
    ends = draw(st.sets(st.integers(0, 2 * len(layers) - 1)))
    mode = draw(st.sampled_from(MODES))
    around = draw(st.sampled_from([None, "all_reduce", "sequence"]))
    return stage_phases(layers, mode, block_ends=ends, loss=draw(st.booleans()), collectives=around)


@st.composite
def costs(draw: st.DrawFn) -> dict[str, PhaseCost]:
    number = st.integers(0, 5)
    return {name: PhaseCost(*(draw(number) for _ in range(4))) for name in ESTIMATED_COSTS}


@settings(max_examples=200, deadline=None)
@given(forward=stages(), backward=stages(), prices=costs(), rebuild=st.booleans())
def test_plans_are_valid_and_no_longer_than_one_after_the_other(
    forward: tuple[Phase, ...],
    backward: tuple[Phase, ...],
    prices: dict[str, PhaseCost],
    rebuild: bool,
) -> None:
    plan = interleave(forward, backward, prices, rebuild=rebuild)
    assert plan == interleave(forward, backward, prices, rebuild=rebuild)
    spans = simulate_lanes(plan, forward, backward, prices)
    length = max(span.end for span in spans)
    for lane in Lane:
        own = [span for span in spans if span.lane is lane]
        assert sum(span.end - span.start for span in own) <= length
        for before, after in itertools.pairwise(own):
            assert before.end <= after.start
    alone = sum(prices[phase.name].forward for phase in forward)
    alone += sum(prices[phase.name].dgrad + prices[phase.name].wgrad for phase in backward)
    if rebuild:
        alone += sum(prices[phase.name].rebuild for phase in backward if phase.begins_block)
    assert length <= alone
    assert {step.op for step in plan} <= set("FBWR") - (set() if rebuild else {"R"})


@settings(max_examples=100, deadline=None)
@given(stage=stages(), data=st.data())
def test_every_single_corruption_is_caught(stage: tuple[Phase, ...], data: st.DataObject) -> None:
    plan = list(interleave(stage, stage, rebuild=True))
    place = data.draw(st.integers(0, len(plan) - 1))
    step = plan[place]
    kind = data.draw(st.sampled_from(["dropped", "doubled", "first", "renumbered"]))
    if kind == "dropped" and step.op in "FB":
        plan.pop(place)
    elif kind == "doubled":
        plan.append(step)
    elif kind == "first" and step.op == "W":
        plan.insert(0, plan.pop(place))
    elif kind == "renumbered":
        plan[place] = dataclasses.replace(step, phase=len(stage))
    else:
        return
    with pytest.raises(ScheduleError):
        check_plan(tuple(plan), stage, stage)


def test_exchanges_hide_behind_the_other_side() -> None:
    """Closed form: two sides of product, exchange, product, equal in length, take turns exactly."""
    row = (Phase("a"), Phase("x", Lane.COMMUNICATION), Phase("b"))
    prices = {"a": PhaseCost(3, 3), "x": PhaseCost(3, 3), "b": PhaseCost(3, 3)}
    spans = simulate_lanes(interleave(row, row, prices), row, row, prices)
    assert max(span.end for span in spans) == 12  # four products, no exchange exposed
    slow = simulate_lanes(serial(row, row), row, row, prices)
    assert max(span.end for span in slow) == 12 + 6  # both are


def test_weight_gradients_fill_what_is_left() -> None:
    row = (Phase("x", Lane.COMMUNICATION), Phase("b"))
    prices = {"x": PhaseCost(5, 5), "b": PhaseCost(1, 1, 4)}
    spans = simulate_lanes(interleave((), row, prices), (), row, prices)
    assert [str(span.phase) for span in spans] == ["b", "x", "b"]
    assert max(span.end for span in spans) == 6


def test_a_phase_without_a_cost_is_named() -> None:
    with pytest.raises(ScheduleError, match="no cost for the phase 'odd'; add one to attention, "):
        interleave((Phase("odd"),), ())


def test_the_rebuild_of_a_block_comes_one_block_ahead() -> None:
    row = stage_phases([False] * 2, "all", block_ends={1, 3}, loss=False)
    plan = interleave((), row, rebuild=True)
    last, first = (
        Step("R", place) for place, phase in [*enumerate(row)][::-1] if phase.begins_block
    )
    assert plan[0] == last
    entered = Step("B", last.phase)
    assert plan.index(first) > plan.index(entered)
    assert plan.index(first) < plan.index(Step("B", first.phase)) - 2


@pytest.mark.parametrize(
    ("collectives", "names"),
    [
        (None, ["attention", "attention_post", "mlp", "mlp_post"]),
        (
            "sequence",
            [
                "attention_gather *",
                "attention",
                "attention_scatter *",
                "attention_post",
                "mlp_gather *",
                "mlp",
                "mlp_scatter *",
                "mlp_post",
            ],
        ),
        (
            "all_reduce",
            [
                "attention_copy *",
                "attention",
                "attention_reduce *",
                "attention_post",
                "mlp_copy *",
                "mlp",
                "mlp_reduce *",
                "mlp_post",
            ],
        ),
    ],
)
def test_collectives_around_a_branch_are_on_the_communication_lane(
    collectives: Collectives | None, names: list[str]
) -> None:
    row = stage_phases([False], "recompute", loss=False, collectives=collectives)
    marks = {Lane.COMMUNICATION: " *", Lane.COMPUTE: ""}
    assert [phase.name + marks[phase.lane] for phase in row[1:]] == names
    experts = stage_phases([True], "recompute", loss=False, collectives=collectives)
    around = [phase.name for phase in experts if phase.lane is Lane.COMMUNICATION]
    attention = [name[:-2] for name in names if name.startswith("attention") and name[-1] == "*"]
    assert around == [*attention, "dispatch", "combine"]  # experts keep their own


def test_collectives_hide_behind_the_other_side() -> None:
    """Without sequence parallelism each takes time in one direction only."""
    for collectives in ("sequence", "all_reduce"):
        row = stage_phases([False] * 4, "all", loss=False, collectives=collectives)
        spans = simulate_lanes(interleave(row, row), row, row)
        products = [(s.start, s.end) for s in spans if s.lane is Lane.COMPUTE]
        exchanges = [(s.start, s.end) for s in spans if s.lane is Lane.COMMUNICATION]
        hidden = length(intersection(union(exchanges), union(products)))
        assert hidden > 0.9 * length(union(exchanges)) > 0
