"""Every single-action corruption of a schedule is refused by rank and action, or computes the same.

What an error says is compared with the rows themselves, so that it is refused for what is wrong
with it. What is accepted has to lower, simulate and execute to the losses and gradients of a loop.
"""

from functools import cache

import pytest
from helpers import whole
from helpers.schedules import costs, schedules
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_megatron.pipeline.actions import Action, Compute, Op, parts
from mhc_megatron.pipeline.catalogue import CATALOGUE, generate
from mhc_megatron.pipeline.costs import Costs
from mhc_megatron.pipeline.errors import Deadlock, InvalidSchedule
from mhc_megatron.pipeline.lower import lower
from mhc_megatron.pipeline.recompute import place_recompute
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.simulate import simulate
from mhc_megatron.pipeline.validate import validate

PROPERTY = settings(deadline=None, max_examples=60, derandomize=True)


def _pick(data: st.DataObject, schedule: Schedule) -> tuple[int, list[Action], int]:
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    row = list(schedule.ranks[rank])
    return rank, row, data.draw(st.integers(0, len(row) - 1))


def _refused(schedule: Schedule, rank: int, compute: Compute, problem: str) -> None:
    with pytest.raises(InvalidSchedule) as caught:
        validate(schedule)
    assert str(caught.value) == f"{schedule.name}: rank {rank}: {compute} {problem}"
    assert (caught.value.rank, caught.value.compute) == (rank, compute)


@cache
def _serial(num_stages: int, num_mb: int) -> whole.Outcome:
    return whole.serial(num_stages, num_mb)


def _computes_the_same(schedule: Schedule, given_costs: Costs | None = None) -> None:
    lower(schedule)
    simulate(schedule, given_costs)
    expected = _serial(schedule.num_stages, schedule.num_mb)
    assert whole.equal(whole.executed(schedule), expected)


MISSING = {
    Op.F: "is missing; add it",
    Op.B: "is missing, and so are I and W; add B, or I and W",
    Op.I: "is missing beside W; add it, or make W a whole B",
    Op.W: "is missing beside I; add it, or make I a whole B",
}


@given(schedules(), st.data())
@PROPERTY
def test_a_dropped_action_is_named(schedule: Schedule, data: st.DataObject) -> None:
    rank, row, index = _pick(data, schedule)
    first = parts(row.pop(index))[0]  # of an Overlap the forward
    changed = schedule.with_rank(rank, row)
    if first.op is Op.R:
        validate(changed)  # the backward rebuilds instead
        _computes_the_same(changed)
    else:
        _refused(changed, rank, first, MISSING[first.op])


@given(schedules(), st.data())
@PROPERTY
def test_a_repeated_action_is_named(schedule: Schedule, data: st.DataObject) -> None:
    rank, row, index = _pick(data, schedule)
    action = row[index]
    row.insert(data.draw(st.integers(0, len(row))), action)
    _refused(schedule.with_rank(rank, row), rank, parts(action)[0], "appears twice; keep one")


@given(schedules(), st.data())
@PROPERTY
def test_an_action_on_another_rank_is_named(schedule: Schedule, data: st.DataObject) -> None:
    if schedule.num_ranks == 1:
        return
    rank, row, index = _pick(data, schedule)
    to = (rank + data.draw(st.integers(1, schedule.num_ranks - 1))) % schedule.num_ranks
    action = row.pop(index)
    other = list(schedule.ranks[to])
    other.insert(data.draw(st.integers(0, len(other))), action)
    changed = schedule.with_rank(rank, row).with_rank(to, other)
    _refused(changed, to, parts(action)[0], f"belongs on rank {rank}; move it there")


# What a compute needs of its own stage and micro-batch, where the schedule has it.
OWN = {
    Op.F: (),
    Op.R: (Op.F,),
    Op.B: (Op.F, Op.R),
    Op.I: (Op.F, Op.R),
    Op.W: (Op.I,),
}


def _wrong_orders(row: list[Action]) -> dict[str, set[Compute]]:
    """What is to be said of each wrong order in a row, and which computes that names."""
    place = {compute: index for index, action in enumerate(row) for compute in parts(action)}
    found = {}
    for early, index in place.items():
        for op in OWN[early.op]:
            late = Compute(op, early.stage, early.mb)
            if late in place and place[late] >= index:
                text = f"{early} comes before {late}, which it needs; move it behind"
                found[text] = {early, late}
        for late in place if early.op is Op.W else ():
            if late.op is not Op.W or late.stage != early.stage or index >= place[late]:
                continue
            first, second = (Compute(Op.I, each.stage, each.mb) for each in (late, early))
            if place[first] < place[second]:
                text = (
                    f"{early} comes before {late}, but {first} before {second}; weight gradients "
                    "follow the order of I"
                )
                found[text] = {early, late, first, second}
    return found


def _check_cycle(schedule: Schedule, error: Deadlock, rank: int, swapped: set[Compute]) -> None:
    """From the rank with the swap, who waits for whom leads back to it, and to a swapped action."""
    stuck = {at: (action, needs) for at, action, needs in error.stuck}
    at = rank
    for _ in stuck:
        wanted = stuck[at][1][0]
        at = schedule.placement.rank_of(wanted.stage, wanted.mb)
        if at == rank:
            break
    assert at == rank, "the rank with the swap does not wait for itself"
    assert swapped & {*parts(stuck[rank][0]), wanted}
    assert f"\nrank {rank} at {stuck[rank][0]} waits for " in error.report()


def _accepted(schedule: Schedule, rank: int, index: int, other: int) -> Schedule | None:
    """The schedule with two actions of a rank swapped; None if it is refused, rightly."""
    row = list(schedule.ranks[rank])
    swapped = {*parts(row[index]), *parts(row[other])}
    row[index], row[other] = row[other], row[index]
    changed = schedule.with_rank(rank, row)
    wrong = _wrong_orders(row)
    assert all(named & swapped for named in wrong.values())
    try:
        validate(changed)
    except InvalidSchedule as error:
        assert error.rank == rank
        assert str(error).removeprefix(f"{schedule.name}: rank {rank}: ") in wrong
        return None
    except Deadlock as error:
        assert not wrong
        _check_cycle(changed, error, rank, swapped)
        return None
    assert not wrong
    return changed


@given(schedules(), st.data())
@PROPERTY
def test_a_swap_is_named_or_computes_the_same(schedule: Schedule, data: st.DataObject) -> None:
    rank, row, index = _pick(data, schedule)
    near = min(index + data.draw(st.integers(1, 3)), len(row) - 1)
    other = near if data.draw(st.booleans()) else data.draw(st.integers(0, len(row) - 1))
    changed = _accepted(schedule, rank, index, other)
    if changed is not None:
        _computes_the_same(changed, data.draw(costs(schedule.num_stages)))


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_swap_of_neighbours_is_named_or_computes_the_same(name: str) -> None:
    num_ranks = 4 if name == "dualpipe" else 3
    plain = generate(name, num_ranks=num_ranks, num_mb=4 * num_ranks)
    refused, accepted = 0, []
    for schedule in (plain, place_recompute(plain)):
        for rank, row in enumerate(schedule.ranks):
            for index in range(len(row) - 1):
                changed = _accepted(schedule, rank, index, index + 1)
                if changed is None:
                    refused += 1
                else:
                    accepted.append(changed)
    assert refused > num_ranks and len(accepted) > num_ranks
    for changed in accepted[:: 1 + len(accepted) // 12]:
        _computes_the_same(changed)
