"""A schedule: who computes what, in which order. Data, and nothing else."""

from collections.abc import Iterable
from dataclasses import dataclass

from mhc_megatron.pipeline.actions import Action
from mhc_megatron.pipeline.placement import Placement
from mhc_megatron.pipeline.rows import Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """One training step of a pipeline.

    Attributes:
        name: for messages and titles.
        placement: the rank of every (stage, micro-batch).
        num_mb: micro-batches of the step; in a mirrored placement those of both directions.
        ranks: what each rank computes, in order. Communication is not part of it: ``lower`` adds
            it, and ``simulate`` accounts for it.
    """

    name: str
    placement: Placement
    num_mb: int
    ranks: tuple[Row, ...]

    @property
    def num_ranks(self) -> int:
        """Ranks of the pipeline."""
        return self.placement.num_ranks

    @property
    def num_stages(self) -> int:
        """Stages of the model."""
        return self.placement.num_stages

    @property
    def num_actions(self) -> int:
        """Actions of all ranks; an Overlap is one."""
        return sum(len(row) for row in self.ranks)

    def with_rank(self, rank: int, actions: Iterable[Action]) -> "Schedule":
        """The same schedule with another order of one rank."""
        ranks = (*self.ranks[:rank], Row(actions), *self.ranks[rank + 1 :])
        return Schedule(name=self.name, placement=self.placement, num_mb=self.num_mb, ranks=ranks)
