"""What validate accepts and refuses, by whole messages; test_corruptions.py has corruptions."""

import dataclasses

import pytest
from helpers.schedules import schedules
from hypothesis import given, settings

from mhc_megatron.pipeline.actions import Compute, Op, Overlap
from mhc_megatron.pipeline.catalogue import generate
from mhc_megatron.pipeline.errors import Deadlock, InvalidSchedule, ScheduleError
from mhc_megatron.pipeline.rows import Row
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.text import from_csv
from mhc_megatron.pipeline.validate import validate


@given(schedules())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_every_generated_schedule_is_valid(schedule: Schedule) -> None:
    validate(schedule)


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
            "rank 0: 0W1 comes before 0W0, but 0I0 before 0I1; weight gradients follow the order "
            "of I",
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
