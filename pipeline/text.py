"""Schedules as text: one line per rank, the cells of PyTorch's pipelining CSV files."""

import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

from mhc_megatron.pipeline.actions import Action, Compute, Op, Overlap, parts
from mhc_megatron.pipeline.errors import ScheduleError
from mhc_megatron.pipeline.placement import Placement
from mhc_megatron.pipeline.rows import MAX_MB, MAX_STAGES, Row, mbs_of, stages_of
from mhc_megatron.pipeline.schedule import Schedule

_COMPUTE = re.compile(r"(\d+)([FBIWR])(\d+)")
_OVERLAP = re.compile(r"\((\d+)F(\d+);(\d+)B(\d+)\)OVERLAP_F_B")
# Communication and sharding: ``lower`` places its own.
_LEFT_OUT = re.compile(r"\d+(?:(?:SEND|RECV)_[FB]\d+|UNSHARD|RESHARD|REDUCE_GRAD)")
_WHOLE_BACKWARD = re.compile(r"\d+BW\d+")


def to_csv(schedule: Schedule) -> str:
    """A line per rank: ``0F0,0F1,(0F2;7B0)OVERLAP_F_B,...``.

    PyTorch reads it, unless the schedule has rebuilds (R) or is mirrored.
    """
    return "".join(",".join(map(_cell, row)) + "\n" for row in schedule.ranks)


def from_csv(text: str, placement: Placement | None = None, *, name: str = "csv") -> Schedule:
    """Read a schedule. It may still be wrong: ``validate`` says so.

    Args:
        text: a line per rank; empty cells are idle steps, cells of communication are left out.
        placement: where stages run; None takes it from the text.
        name: of the schedule, for messages.

    Raises:
        ScheduleError: a cell is no action, or a line has none, with its line and cell.
    """
    lines = text.rstrip("\n").split("\n")
    rows = tuple(Row(_actions(line, number)) for number, line in enumerate(lines, start=1))
    for number, row in enumerate(rows, start=1):
        if not len(row):
            raise ScheduleError(
                f"line {number} has no actions; a line lists those of a rank, such as "
                "0F0,0F1,0B0,0B1: delete it, or write some"
            )
    codes = np.concatenate([row.codes for row in rows])
    num_stages, num_mb = _count(stages_of(codes), "stage"), _count(mbs_of(codes), "micro-batch")
    if placement is None:
        placement = _placement_of(rows, num_stages, num_mb)
    return Schedule(name=name, placement=placement, num_mb=num_mb, ranks=rows)


def cells_of(text: str, rank: int, compute: Compute) -> list[int]:
    """The cells of the rank's line in which ``compute`` stands, in a text that ``from_csv`` reads.

    Returns:
        Columns, from 1.
    """
    line = text.split("\n")[rank]
    return [column for column, cell in _cells(line) if compute in parts(_action(cell))]


def _cell(action: Action) -> str:
    return f"{action}OVERLAP_F_B" if isinstance(action, Overlap) else str(action)


def _cells(line: str) -> Iterator[tuple[int, str]]:
    """Columns, from 1, and texts of the cells that are no idle steps and no communication."""
    for column, cell in enumerate(line.split(","), start=1):
        cell = cell.strip()
        if cell and not _LEFT_OUT.fullmatch(cell):
            yield column, cell


def _actions(line: str, number: int) -> Iterator[Action]:
    for column, cell in _cells(line):
        try:
            yield _action(cell)
        except ScheduleError as error:
            raise ScheduleError(f"line {number}, cell {column}: {error}") from None


def _action(cell: str) -> Action:
    compute, overlap = _COMPUTE.fullmatch(cell), _OVERLAP.fullmatch(cell)
    if compute:
        return _compute(Op(compute[2]), compute[1], compute[3])
    if overlap:
        forward = _compute(Op.F, overlap[1], overlap[2])
        return Overlap(forward, _compute(Op.B, overlap[3], overlap[4]))
    if _WHOLE_BACKWARD.fullmatch(cell):
        raise ScheduleError(
            f"{cell!r} is PyTorch's old notation; write B for BW, and I for the B that has a W"
        )
    raise ScheduleError(
        f"{cell!r} is not an action; write 2F0, 2B0, 2I0, 2W0, 2R0 (stage, operation, micro-batch) "
        "or (0F7;7B3)OVERLAP_F_B"
    )


def _compute(op: Op, stage: str, mb: str) -> Compute:
    # Of thousands of digits Python makes no number.
    if max(len(stage), len(mb)) > 9 or int(stage) >= MAX_STAGES or int(mb) >= MAX_MB:
        raise ScheduleError(
            f"{stage}{op.value}{mb} is above the limits of {MAX_STAGES} stages and {MAX_MB} "
            "micro-batches; number both from 0"
        )
    return Compute(op, int(stage), int(mb))


def _count(numbers: np.ndarray, kind: str) -> int:
    """How many there are, if they start at 0 and have no gap."""
    found = np.unique(numbers)
    count = int(found[-1]) + 1
    for absent in np.flatnonzero(found != np.arange(len(found)))[:1].tolist():
        raise ScheduleError(
            f"{kind} {absent} has no action, but {kind} {count - 1} has; number from 0 without a "
            "gap"
        )
    return count


def _placement_of(rows: tuple[Row, ...], num_stages: int, num_mb: int) -> Placement:
    """Where most of a stage's actions are, so that one in a wrong place is found as such."""
    early: list[Counter[int]] = [Counter() for _ in range(num_stages)]
    late: list[Counter[int]] = [Counter() for _ in range(num_stages)]
    for rank, row in enumerate(rows):
        stages, mbs = stages_of(row.codes), mbs_of(row.codes)
        for half, chosen in ((early, mbs < num_mb // 2), (late, mbs >= num_mb // 2)):
            for stage in stages[chosen].tolist():
                half[stage][rank] += 1
    first, second = (
        [counter.most_common(1)[0][0] if counter else -1 for counter in half]
        for half in (early, late)
    )
    mirror = [len(rows) - 1 - rank for rank in first]
    if second == mirror and first != mirror:
        return Placement(num_ranks=len(rows), ranks=tuple(first), mirrored_from=num_mb // 2)
    both = [a + b for a, b in zip(early, late, strict=True)]
    ranks = tuple(counter.most_common(1)[0][0] for counter in both)
    return Placement(num_ranks=len(rows), ranks=ranks)
