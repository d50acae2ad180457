"""What every compute needs before it can run: the one place that knows the flow of data."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mhc_megatron.pipeline.actions import Action, Compute, Op, Overlap
from mhc_megatron.pipeline.rows import OPS, compute_of, mbs_of, ops_of, stages_of
from mhc_megatron.pipeline.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Need:
    """A result that has to be there first, for the same micro-batch.

    Attributes:
        any_of: the operations of which one makes it.
        shift: in which stage, relative to the one that needs it; outside the model nothing is
            needed.
        optional: needed only where the schedule has it.
    """

    any_of: tuple[Op, ...]
    shift: int = 0
    optional: bool = False


_BACKWARD = (Op.B, Op.I)
_OWN_FORWARD, _OWN_REBUILD = Need((Op.F,)), Need((Op.R,), optional=True)
_GRADIENT = Need(_BACKWARD, shift=1)

NEEDS: dict[Op, tuple[Need, ...]] = {
    Op.F: (Need((Op.F,), shift=-1),),
    Op.B: (_OWN_FORWARD, _OWN_REBUILD, _GRADIENT),
    Op.I: (_OWN_FORWARD, _OWN_REBUILD, _GRADIENT),
    Op.W: (Need((Op.I,)),),
    Op.R: (_OWN_FORWARD,),
}

# Columns of Table.needs: an Overlap has the one need of F and the three of B.
_FORWARD_COLUMNS, _WIDTH = 1, 4


def message_of(compute: Compute, num_stages: int) -> int | None:
    """The stage that takes ``compute``'s result as its input, if another stage does."""
    if compute.op is Op.F:
        stage = compute.stage + 1
    elif compute.op in _BACKWARD:
        stage = compute.stage - 1
    else:
        return None
    return stage if 0 <= stage < num_stages else None


def inputs_of(compute: Compute, num_stages: int) -> Iterator[tuple[Compute, ...]]:
    """What ``compute`` needs from another stage; of each tuple one (B or I) is made there."""
    for need in NEEDS[compute.op]:
        stage = compute.stage + need.shift
        if need.shift and 0 <= stage < num_stages:
            yield tuple(Compute(op, stage, compute.mb) for op in need.any_of)


def edges_of(schedule: Schedule) -> list[tuple[int, int]]:
    """The directed edges (from, to) between ranks that a schedule uses, in one order for all."""
    placement = schedule.placement
    edges = set()
    for mb in {0, schedule.num_mb - 1}:  # of either direction, where there are two
        ranks = [placement.rank_of(stage, mb) for stage in range(schedule.num_stages)]
        for here, there in pairwise(ranks):
            if here != there:
                edges |= {(here, there), (there, here)}
    return sorted(edges, key=lambda edge: (min(edge), max(edge), edge))


class Table:
    """A schedule in flat arrays. Computes and actions are numbered through all ranks, in order.

    Attributes:
        codes: [computes] as in ``Row.codes``.
        ops: [computes] indices into OPS.
        stages: [computes].
        mbs: [computes].
        ranks: [computes].
        starts: [actions] an action's first compute.
        action_of: [computes] the action that a compute belongs to.
        first_action: [ranks + 1] where the actions of a rank start.
    """

    def __init__(self, schedule: Schedule) -> None:
        rows = schedule.ranks
        sizes = [len(row.codes) for row in rows]
        self.schedule = schedule
        self.codes = np.concatenate([row.codes for row in rows])
        self.ops, self.stages = ops_of(self.codes), stages_of(self.codes)
        self.mbs = mbs_of(self.codes)
        self.ranks = np.repeat(np.arange(len(rows)), sizes)
        offsets = np.concatenate(([0], np.cumsum(sizes)))
        starts = [row.starts() for row in rows]
        self.starts = np.concatenate(
            [start + offset for start, offset in zip(starts, offsets[:-1], strict=True)]
        )
        is_start = np.zeros(len(self.codes), dtype=np.int64)
        is_start[self.starts] = 1
        self.action_of = np.cumsum(is_start) - 1
        self.first_action = np.concatenate(([0], np.cumsum([len(start) for start in starts])))
        self._made_by: dict[Op, np.ndarray] = {}

    def is_op(self, op: Op) -> np.ndarray:
        """[computes] whether it is ``op``."""
        return self.ops == OPS.index(op)

    def keys(self) -> np.ndarray:
        """[computes] the number of its (stage, micro-batch), ``stage * num_mb + mb``."""
        return self.stages * self.schedule.num_mb + self.mbs

    def made_by(self, op: Op) -> np.ndarray:
        """[stages * num_mb] the compute that is ``op`` of that (stage, micro-batch), or -1."""
        if op not in self._made_by:
            found = np.flatnonzero(self.is_op(op))
            at = np.full(self.schedule.num_stages * self.schedule.num_mb, -1, dtype=np.int64)
            at[self.keys()[found]] = found
            self._made_by[op] = at
        return self._made_by[op]

    def action(self, index: int) -> Action:
        """The action with that number."""
        start = int(self.starts[index])
        stop = int(self.starts[index + 1]) if index + 1 < len(self.starts) else len(self.codes)
        made = [compute_of(int(value)) for value in self.codes[start:stop]]
        return Overlap(made[0], made[1]) if len(made) == 2 else made[0]

    def needs(self) -> tuple[np.ndarray, np.ndarray]:
        """What every action waits for.

        Returns:
            [actions, 4] the action that makes it; ``len(starts)`` for nothing, one more for a
            result that the schedule never makes. [actions, 4] whether it comes from another rank.
        """
        num_actions, num_mb = len(self.starts), self.schedule.num_mb
        actions = np.full((num_actions, _WIDTH), num_actions, dtype=np.int64)
        crosses = np.zeros((num_actions, _WIDTH), dtype=bool)
        for op, needs in NEEDS.items():
            of_op = np.flatnonzero(self.is_op(op))
            for column, need in enumerate(needs, start=0 if op is Op.F else _FORWARD_COLUMNS):
                stages = self.stages[of_op] + need.shift
                inside = (stages >= 0) & (stages < self.schedule.num_stages)
                users, stages = of_op[inside], stages[inside]
                makers = self._makers(need, stages * num_mb + self.mbs[users])
                known = makers >= 0
                absent = num_actions if need.optional else num_actions + 1
                to = self.action_of[users]
                actions[to, column] = np.where(known, self.action_of[makers], absent)
                crosses[to, column] = known & (self.ranks[makers] != self.ranks[users])
        return actions, crosses

    def _makers(self, need: Need, keys: np.ndarray) -> np.ndarray:
        found = self.made_by(need.any_of[0])[keys]
        for op in need.any_of[1:]:
            found = np.where(found >= 0, found, self.made_by(op)[keys])
        return found
