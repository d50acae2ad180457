"""What validate refuses, by rank and action; every corruption of a schedule is among it."""

import dataclasses
from itertools import pairwise

import pytest
from helpers.schedules import schedules
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_megatron.pipeline.actions import Action, Compute, Op, Overlap, parts
from mhc_megatron.pipeline.catalogue import CATALOGUE, generate
from mhc_megatron.pipeline.errors import Deadlock, InvalidSchedule, ScheduleError
from mhc_megatron.pipeline.recompute import place_recompute
from mhc_megatron.pipeline.rows import Row
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.text import from_csv
from mhc_megatron.pipeline.validate import validate

PROPERTY = settings(deadline=None, max_examples=60, derandomize=True)


@given(schedules())
@PROPERTY
def test_every_generated_schedule_is_valid(schedule: Schedule) -> None:
    validate(schedule)


def _refused(schedule: Schedule, rank: int, action: Action) -> None:
    """It is refused, by a message with the rank and (part of) the action."""
    with pytest.raises(ScheduleError) as caught:
        validate(schedule)
    message = str(caught.value)
    assert f"rank {rank}" in message
    assert any(str(compute) in message for compute in parts(action)), (action, message)


def _pick(data: st.DataObject, schedule: Schedule) -> tuple[int, list[Action], int]:
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    row = list(schedule.ranks[rank])
    return rank, row, data.draw(st.integers(0, len(row) - 1))


@given(schedules(), st.data())
@PROPERTY
def test_a_dropped_action_is_named(schedule: Schedule, data: st.DataObject) -> None:
    rank, row, index = _pick(data, schedule)
    action = row.pop(index)
    if isinstance(action, Compute) and action.op is Op.R:
        validate(schedule.with_rank(rank, row))  # the backward rebuilds instead
    else:
        _refused(schedule.with_rank(rank, row), rank, action)


@given(schedules(), st.data())
@PROPERTY
def test_a_repeated_action_is_named(schedule: Schedule, data: st.DataObject) -> None:
    rank, row, index = _pick(data, schedule)
    action = row[index]
    row.insert(data.draw(st.integers(0, len(row))), action)
    _refused(schedule.with_rank(rank, row), rank, action)


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
    _refused(schedule.with_rank(rank, row).with_rank(to, other), to, action)


def _depends(schedule: Schedule, first: Action, second: Action) -> bool:
    """Whether ``second`` needs ``first``, or weight gradients would leave the order of I."""
    made = {(c.op, c.stage, c.mb) for c in parts(first)}
    for c in parts(second):
        needed = {
            Op.F: {(Op.F, c.stage - 1, c.mb)},
            Op.W: {(Op.I, c.stage, c.mb)} | {(Op.W, c.stage, mb) for mb in range(c.mb)},
            Op.R: {(Op.F, c.stage, c.mb)},
        }.get(
            c.op,
            {
                (Op.F, c.stage, c.mb),
                (Op.R, c.stage, c.mb),
                (Op.B, c.stage + 1, c.mb),
                (Op.I, c.stage + 1, c.mb),
            },
        )
        if made & needed:
            return True
    return False


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_swap_of_dependent_neighbours_is_named(name: str) -> None:
    num_ranks = 4 if name == "dualpipe" else 3
    plain = generate(name, num_ranks=num_ranks, num_mb=4 * num_ranks)
    swaps = 0
    for schedule in (plain, place_recompute(plain)):
        for rank, row in enumerate(schedule.ranks):
            actions = list(row)
            for index, (first, second) in enumerate(pairwise(actions)):
                if not _depends(schedule, first, second):
                    continue
                swapped = [*actions[:index], second, first, *actions[index + 2 :]]
                _refused(schedule.with_rank(rank, swapped), rank, second)
                swaps += 1
    assert swaps > num_ranks


@given(schedules(), st.data())
@PROPERTY
def test_a_swap_is_refused_or_harmless(schedule: Schedule, data: st.DataObject) -> None:
    """Any two actions of a rank: what is accepted has been run to its end."""
    rank, row, index = _pick(data, schedule)
    other = data.draw(st.integers(0, len(row) - 1))
    row[index], row[other] = row[other], row[index]
    changed = schedule.with_rank(rank, row)
    try:
        validate(changed)
    except Deadlock as error:
        assert rank in {stuck for stuck, _, _ in error.stuck}
    except ScheduleError as error:
        assert f"rank {rank}: " in str(error)


TWO = "0F0,0F1,0B0,0B1\n1F0,1F1,1B0,1B1\n"
SPLIT = "0F0,0F1,0I0,0I1,0W0,0W1\n1F0,1F1,1B0,1B1\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TWO.replace("0F1,", ""), "rank 0: 0F1 is missing; add it"),
        (TWO.replace("1B1", "1B0"), "rank 1: 1B0 appears twice; keep one"),
        (TWO.replace("1B1", "1I1"), "rank 1: 1W1 is missing beside I; add it, or make I a whole B"),
        (TWO.replace("1B1", "1W1"), "rank 1: 1I1 is missing beside W; add it, or make W a whole B"),
        (
            TWO.replace(",1B1", ""),
            "rank 1: 1B1 is missing, and so are I and W; add B, or I and W",
        ),
        (
            TWO.replace("0B0", "0B0,0W0"),
            "rank 0: 0W0 is there beside the whole backward B; keep B, or I and W",
        ),
        (
            TWO.replace("0B0", "0B0,0I0"),
            "rank 0: 0I0 is there beside the whole backward B; keep B, or I and W",
        ),
        (TWO.replace("0F1,0B0", "1F1,0F1,0B0"), "rank 0: 1F1 belongs on rank 1; move it there"),
        (
            TWO.replace("1F1,1B0", "1B0,1B1,1F1").replace("F1,1B1\n", "F1\n"),
            "rank 1: 1B1 comes before 1F1, which it needs; move it behind",
        ),
        (
            SPLIT.replace("0W0,0W1", "0W1,0W0"),
            "rank 0: 0W1 comes before 0W0, but I of micro-batch 0 before that of 1; "
            "weight gradients follow the order of I",
        ),
        (SPLIT.replace("0I1,0W0", "0W0,0R1,0I1"), None),
        (
            SPLIT.replace("0I1,0W0", "0I1,0R1,0W0"),
            "rank 0: 0I1 comes before 0R1, which it needs; move it behind",
        ),
        (
            TWO.replace("0F0,0F1,0B0", "(0F1;0B0)OVERLAP_F_B,0F0"),
            "rank 0: 0B0 comes before 0F0, which it needs; move it behind",
        ),
        (
            "0F0,0F1,0B0,0B1\n1F0,1F1,1B1,1B0\n",
            None,
        ),
        (
            "0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n",
            "deadlock: rank 0 at 0B0 waits for 1B0; rank 1 at 1F1 waits for 0F1",
        ),
    ],
)
def test_messages(text: str, message: str | None) -> None:
    schedule = from_csv(text, generate("gpipe", num_ranks=2, num_mb=2).placement, name="two")
    if message is None:
        validate(schedule)
        return
    with pytest.raises(ScheduleError) as caught:
        validate(schedule)
    assert str(caught.value) == f"two: {message}"


def test_an_overlap_with_itself_is_refused() -> None:
    schedule = generate("gpipe", num_ranks=1, num_mb=1)
    pair = Overlap(Compute(Op.F, 0, 0), Compute(Op.B, 0, 0))
    with pytest.raises(ScheduleError, match="rank 0: 0B0 comes before 0F0, which it needs"):
        validate(schedule.with_rank(0, [pair]))


def test_what_is_outside_is_refused() -> None:
    schedule = generate("gpipe", num_ranks=2, num_mb=2)
    for extra in (Compute(Op.F, 2, 0), Compute(Op.F, 0, 2)):
        with pytest.raises(ScheduleError) as caught:
            validate(schedule.with_rank(0, [*schedule.ranks[0], extra]))
        assert str(caught.value) == (
            f"gpipe: rank 0: {extra} is outside the 2 stages and 2 micro-batches; leave it out"
        )
    with pytest.raises(ScheduleError, match="gpipe: 1 rows for 2 ranks"):
        validate(dataclasses.replace(schedule, ranks=schedule.ranks[:1]))
    with pytest.raises(ScheduleError, match="rank 1: 1F0 is missing"):
        validate(dataclasses.replace(schedule, ranks=(schedule.ranks[0], Row([]))))


def test_most_of_a_schedule_may_be_missing() -> None:
    """Nothing is made for the million pairs of stages and micro-batches that are not there."""
    cells = [f"{number}F{number},{number}B{number}" for number in range(1000)]
    schedule = from_csv("\n".join(cells), name="diagonal")
    with pytest.raises(InvalidSchedule) as caught:
        validate(schedule)
    assert str(caught.value) == "diagonal: rank 0: 0F1 is missing; add it"


def test_a_deadlock_reports_every_rank() -> None:
    schedule = generate("one_f_one_b", num_ranks=100, num_mb=120)
    row = list(schedule.ranks[0])
    row[0], row[-1] = row[-1], row[0]
    # The first backward before the forwards it needs is found without running anything.
    with pytest.raises(InvalidSchedule, match="rank 0: 0B119 comes before 0F119"):
        validate(schedule.with_rank(0, row))
    row = list(schedule.ranks[20])
    row.insert(0, row.pop(row.index(Compute(Op.F, 20, 110))))
    with pytest.raises(Deadlock) as caught:
        validate(schedule.with_rank(20, row))
    error = caught.value
    assert [rank for rank, _, _ in error.stuck] == list(range(100))
    # Ranks before 20 have sent what they may send ahead: forwards as many as 1F1B lets them.
    waits = [
        f"rank {rank} at {rank}B0 waits for {rank + 1}B0"
        if rank < 20
        else "rank 20 at 20F110 waits for 19F110"
        if rank == 20
        else f"rank {rank} at {rank}F0 waits for {rank - 1}F0"
        for rank in range(100)
    ]
    assert error.report().split("\n") == ["one_f_one_b: deadlock: 100 ranks wait", *waits]
    assert str(error) == f"one_f_one_b: deadlock: {'; '.join(waits[:8])}; and 92 more ranks"
