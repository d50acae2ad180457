"""Run a schedule on paper: when every action starts and ends, and where it gets stuck."""

from collections.abc import Iterator

import numpy as np

from mhc_megatron.pipeline.actions import Action, Compute, Op, parts
from mhc_megatron.pipeline.costs import Costs, StageCosts
from mhc_megatron.pipeline.dataflow import NEEDS, Table
from mhc_megatron.pipeline.errors import Deadlock
from mhc_megatron.pipeline.rows import OPS, PAIRED
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.timeline import Timeline

_UNKNOWN = -1


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """When every action of every rank runs, if each starts as soon as it can.

    Args:
        schedule: what is run, in order on every rank.
        costs: of stages and messages; None for F = I = W = 1 and messages that take no time.

    Returns:
        Starts, ends, bubbles, and what each rank holds at most. Integer costs give exact integers.

    Raises:
        Deadlock: the schedule cannot finish.
        ScheduleError: ``costs`` name a stage that the schedule does not have.
    """
    costs = Costs() if costs is None else costs
    table = Table(schedule)
    stages = costs.of_stages(schedule.num_stages)
    durations = _durations(table, stages)
    start, end = run(table, durations, costs)
    live, held = _peaks(table, stages)
    return Timeline(
        schedule=schedule,
        unit=costs.unit,
        first_action=table.first_action,
        start=start,
        end=end,
        peak_live=live,
        peak_bytes=held,
    )


def run(table: Table, durations: np.ndarray, costs: Costs) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of every action.

    Every round, all ranks whose next action has its inputs take it: one step of a few vector
    operations for a thousand ranks. The order of the rounds does not enter the times.

    Raises:
        Deadlock: no rank can go on.
    """
    needs, crosses = table.needs()
    message = costs.message_time
    kind = np.result_type(durations, type(message))
    # Behind the actions: the time of "nothing is needed", and of what is never made.
    end = np.full(len(table.starts) + 2, _UNKNOWN, dtype=kind)
    end[-2] = 0
    start = np.zeros(len(table.starts), dtype=kind)
    at, stop = table.first_action[:-1].copy(), table.first_action[1:]
    free = np.zeros(len(at), dtype=kind)
    ranks = np.flatnonzero(at < stop)
    while len(ranks):
        actions = at[ranks]
        inputs = end[needs[actions]]
        ready = inputs.min(axis=1) >= 0
        if not ready.all():
            if not ready.any():
                raise Deadlock(table.schedule.name, _stuck(table, end, at, ranks))
            moving, actions, inputs = ranks[ready], actions[ready], inputs[ready]
        else:
            moving = ranks
        if message:
            inputs = inputs + crosses[actions] * message
        begin = np.maximum(free[moving], inputs.max(axis=1))
        start[actions] = begin
        free[moving] = end[actions] = begin + durations[actions]
        at[moving] += 1
        ranks = ranks[at[ranks] < stop[ranks]]
    return start, end[:-2]


def _durations(table: Table, stages: list[StageCosts]) -> np.ndarray:
    """[actions] time of each; exact integers where all costs are."""
    by_op = {
        Op.F: [c.forward for c in stages],
        Op.B: [c.whole_backward for c in stages],
        Op.I: [c.dgrad for c in stages],
        Op.W: [c.wgrad for c in stages],
        Op.R: [c.recompute for c in stages],
    }
    times = np.array([by_op[op] for op in OPS])
    each = times[table.ops, table.stages]
    total = np.add.reduceat(each, table.starts)
    forward = table.starts[(table.codes[table.starts] & PAIRED) != 0]
    backward = forward + 1
    given = np.array([_UNKNOWN if c.overlap is None else c.overlap for c in stages])
    overlap = given[table.stages[backward]]
    pairs = table.action_of[forward]
    total = total.astype(np.result_type(total, given))
    total[pairs] = np.where(overlap == _UNKNOWN, total[pairs], overlap)
    # Without an R of its own a backward rebuilds first.
    rebuild = np.flatnonzero(_rebuilds(table))
    total[table.action_of[rebuild]] += times[OPS.index(Op.R)][table.stages[rebuild]]
    return total


def _rebuilds(table: Table) -> np.ndarray:
    """[computes] whether it is a B or I whose (stage, micro-batch) has no R."""
    backward = table.is_op(Op.B) | table.is_op(Op.I)
    return backward & (table.made_by(Op.R)[table.keys()] < 0)


def _peaks(table: Table, stages: list[StageCosts]) -> tuple[np.ndarray, np.ndarray]:
    """[ranks] most micro-batches alive on a rank, counted per stage, and most bytes.

    Alive from its F to the end of its B, or of its W. A rank runs one action after the other, so
    this depends on the order alone. In an Overlap the forward's is there before the backward's
    goes.
    """
    last = table.is_op(Op.B) | table.is_op(Op.W)
    born = table.is_op(Op.F)
    held, whole, split, kept = (
        np.array(values, dtype=np.int64)[table.stages]
        for values in (
            [c.held_bytes for c in stages],
            [c.rebuilt_bytes for c in stages],
            [c.rebuilt_by_split for c in stages],
            [c.kept_for_wgrad for c in stages],
        )
    )
    rebuilt = np.where(table.made_by(Op.I)[table.keys()] < 0, whole, split)
    grows = born * held + (table.is_op(Op.R) | _rebuilds(table)) * rebuilt
    shrinks = table.is_op(Op.B) * (held + rebuilt)
    shrinks += table.is_op(Op.I) * (held + rebuilt - kept) + table.is_op(Op.W) * kept
    return _peak(table, born, last), _peak(table, grows, shrinks)


def _peak(table: Table, grows: np.ndarray, shrinks: np.ndarray) -> np.ndarray:
    """[ranks] the highest level, where an action adds before it runs and takes away after it."""
    added = np.add.reduceat(grows.astype(np.int64), table.starts)
    taken = np.add.reduceat(shrinks.astype(np.int64), table.starts)
    during = np.cumsum(added) - np.cumsum(taken) + taken
    spans = zip(table.first_action[:-1], table.first_action[1:], strict=True)
    return np.array([during[first:stop].max(initial=0) for first, stop in spans])


def _stuck(
    table: Table, end: np.ndarray, at: np.ndarray, ranks: np.ndarray
) -> tuple[tuple[int, Action, tuple[Compute, ...]], ...]:
    """For ``Deadlock.stuck``."""
    found = []
    for rank in ranks.tolist():
        action = table.action(int(at[rank]))
        missing = [need for compute in parts(action) for need in _missing(table, end, compute)]
        found.append((rank, action, tuple(missing)))
    return tuple(found)


def _missing(table: Table, end: np.ndarray, compute: Compute) -> Iterator[Compute]:
    """The results that ``compute`` needs and that are not there."""
    num_stages, num_mb = table.schedule.num_stages, table.schedule.num_mb
    for need in NEEDS[compute.op]:
        stage = compute.stage + need.shift
        if not 0 <= stage < num_stages:
            continue
        key = stage * num_mb + compute.mb
        made = [op for op in need.any_of if table.made_by(op)[key] >= 0]
        if not made and not need.optional:
            yield Compute(need.any_of[0], stage, compute.mb)
        elif made and end[table.action_of[table.made_by(made[0])[key]]] == _UNKNOWN:
            yield Compute(made[0], stage, compute.mb)
