"""Whether a schedule computes everything, once, in the right place and in an order that ends."""

import numpy as np

from mhc_megatron.pipeline.actions import Compute, Op
from mhc_megatron.pipeline.costs import Costs
from mhc_megatron.pipeline.dataflow import NEEDS, Table
from mhc_megatron.pipeline.errors import InvalidSchedule, ScheduleError
from mhc_megatron.pipeline.rows import compute_of
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.simulate import run


def validate(schedule: Schedule) -> None:
    """Check a schedule. What passes can be lowered, simulated and executed.

    Every (stage, micro-batch) has F and either B or I and W exactly once, and R at most once, all
    on its rank. On that rank they follow each other as the data does, W in the order of I (queues
    of weight gradients are first in, first out). All ranks together reach the end.

    Raises:
        InvalidSchedule: the first violation, with its rank and action.
        ScheduleError: not a row for each rank.
        Deadlock: the ranks wait for each other.
    """
    if len(schedule.ranks) != schedule.num_ranks:
        raise ScheduleError(
            f"{schedule.name}: {len(schedule.ranks)} rows for {schedule.num_ranks} ranks"
        )
    table = Table(schedule)
    _check_range(table)
    _check_forwards(table)  # before anything is made for every (stage, micro-batch)
    ranks = _expected_ranks(schedule)
    _check_place(table, ranks)
    _check_once(table)
    _check_complete(table, ranks)
    _check_local_order(table)
    _check_weight_order(table)
    run(table, np.ones(len(table.starts), dtype=np.int64), Costs())


def _check_range(table: Table) -> None:
    schedule = table.schedule
    outside = (table.stages >= schedule.num_stages) | (table.mbs >= schedule.num_mb)
    for index in np.flatnonzero(outside)[:1].tolist():
        raise _at(
            table,
            index,
            f"is outside the {schedule.num_stages} stages and {schedule.num_mb} micro-batches; "
            "leave it out",
        )


def _check_forwards(table: Table) -> None:
    """Whether there is an F of every (stage, micro-batch): what is left out may be most of them."""
    schedule = table.schedule
    found = np.unique(table.keys()[table.is_op(Op.F)])
    if len(found) == schedule.num_stages * schedule.num_mb:
        return
    gaps = np.flatnonzero(found != np.arange(len(found)))
    key = int(gaps[0]) if len(gaps) else len(found)
    stage, mb = divmod(key, schedule.num_mb)
    rank = schedule.placement.rank_of(stage, mb)
    raise InvalidSchedule(schedule.name, rank, Compute(Op.F, stage, mb), "is missing; add it")


def _expected_ranks(schedule: Schedule) -> np.ndarray:
    """[stages * num_mb] the rank of each (stage, micro-batch)."""
    placement, num_mb = schedule.placement, schedule.num_mb
    ranks = np.repeat(np.array(placement.ranks)[:, None], num_mb, axis=1)
    if placement.mirrored_from is not None:
        mirrored = ranks[:, placement.mirrored_from :]
        mirrored[...] = schedule.num_ranks - 1 - mirrored
    return ranks.ravel()


def _check_place(table: Table, ranks: np.ndarray) -> None:
    right = ranks[table.keys()]
    for index in np.flatnonzero(right != table.ranks)[:1].tolist():
        raise _at(table, index, f"belongs on rank {right[index]}; move it there")


def _check_once(table: Table) -> None:
    for op in Op:
        found = np.flatnonzero(table.is_op(op))
        again = found[table.made_by(op)[table.keys()[found]] != found]
        for index in again[:1].tolist():
            raise _at(table, index, "appears twice; keep one")


def _check_complete(table: Table, ranks: np.ndarray) -> None:
    there = {op: table.made_by(op) >= 0 for op in (Op.B, Op.I, Op.W)}
    both = "is there beside the whole backward B; keep B, or I and W"
    problems = (
        (Op.W, there[Op.B] & there[Op.W], both),
        (Op.I, there[Op.B] & there[Op.I], both),
        (Op.W, there[Op.I] & ~there[Op.W], "is missing beside I; add it, or make I a whole B"),
        (Op.I, there[Op.W] & ~there[Op.I], "is missing beside W; add it, or make W a whole B"),
        (Op.B, ~there[Op.B] & ~there[Op.I], "is missing, and so are I and W; add B, or I and W"),
    )
    for op, wrong, problem in problems:
        for key in np.flatnonzero(wrong)[:1].tolist():
            compute = Compute(op, *divmod(key, table.schedule.num_mb))
            raise InvalidSchedule(table.schedule.name, int(ranks[key]), compute, problem)


def _check_local_order(table: Table) -> None:
    """What a compute needs on its own rank for its own stage stands before it."""
    for op, needs in NEEDS.items():
        users = np.flatnonzero(table.is_op(op))
        for need in needs:
            for maker in need.any_of if need.shift == 0 else ():
                made = table.made_by(maker)[table.keys()[users]]
                # In one Overlap neither is there when the other starts.
                early = (made >= 0) & (table.action_of[made] >= table.action_of[users])
                for index in np.flatnonzero(early)[:1].tolist():
                    first = compute_of(int(table.codes[made[index]]))
                    raise _at(
                        table,
                        int(users[index]),
                        f"comes before {first}, which it needs; move it behind",
                    )


def _check_weight_order(table: Table) -> None:
    wgrads = np.flatnonzero(table.is_op(Op.W))
    if not len(wgrads):
        return
    dgrads = table.made_by(Op.I)[table.keys()[wgrads]]
    # Of each stage on each rank: W in their order, and the positions of their I have to rise.
    group = table.ranks[wgrads] * table.schedule.num_stages + table.stages[wgrads]
    order = np.argsort(group, kind="stable")
    same = group[order][1:] == group[order][:-1]
    back = same & (np.diff(dgrads[order]) < 0)
    for place in np.flatnonzero(back)[:1].tolist():
        late, early = (compute_of(int(table.codes[wgrads[order[place + k]]])) for k in (0, 1))
        after, before = (Compute(Op.I, each.stage, each.mb) for each in (late, early))
        raise _at(
            table,
            int(wgrads[order[place]]),
            f"comes before {early}, but {before} before {after}; weight gradients follow the "
            "order of I",
        )


def _at(table: Table, index: int, problem: str) -> InvalidSchedule:
    compute = compute_of(int(table.codes[index]))
    return InvalidSchedule(table.schedule.name, int(table.ranks[index]), compute, problem)
