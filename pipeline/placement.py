"""Which rank computes which stage."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where a (stage, micro-batch) runs.

    Attributes:
        num_ranks: ranks of the pipeline.
        ranks: for each stage, in the order of the model's layers, its rank.
        mirrored_from: micro-batches from this one on flow the other way: they run on rank
            ``num_ranks - 1 - rank``, which holds a second copy of the stage. None: no such.
    """

    num_ranks: int
    ranks: tuple[int, ...]
    mirrored_from: int | None = None

    @property
    def num_stages(self) -> int:
        """Stages of the model, copies not counted."""
        return len(self.ranks)

    @property
    def num_copies(self) -> int:
        """Ranks that hold each stage."""
        return 1 if self.mirrored_from is None else 2

    def rank_of(self, stage: int, mb: int) -> int:
        """The rank that computes ``stage`` for ``mb``."""
        rank = self.ranks[stage]
        return rank if not self.is_mirrored(mb) else self.num_ranks - 1 - rank

    def is_mirrored(self, mb: int) -> bool:
        """Whether ``mb`` enters at the last rank."""
        return self.mirrored_from is not None and mb >= self.mirrored_from

    def stages_on(self, rank: int) -> tuple[int, ...]:
        """The stages whose parameters ``rank`` holds, in increasing order."""
        held = {stage for stage, at in enumerate(self.ranks) if at == rank}
        if self.mirrored_from is not None:
            mirror = self.num_ranks - 1 - rank
            held |= {stage for stage, at in enumerate(self.ranks) if at == mirror}
        return tuple(sorted(held))


def linear(num_ranks: int) -> Placement:
    """One stage per rank."""
    return Placement(num_ranks=num_ranks, ranks=tuple(range(num_ranks)))


def looped(num_ranks: int, num_chunks: int) -> Placement:
    """``num_chunks`` stages per rank: stage s on rank ``s % num_ranks``."""
    return Placement(num_ranks=num_ranks, ranks=tuple(range(num_ranks)) * num_chunks)


def vee(num_ranks: int) -> Placement:
    """Two stages per rank, down and back up: the first and the last stage are on rank 0."""
    down = tuple(range(num_ranks))
    return Placement(num_ranks=num_ranks, ranks=down + down[::-1])


def mirrored(num_ranks: int, num_mb: int) -> Placement:
    """One stage per rank, and for the second half of the micro-batches the ranks in reverse."""
    return Placement(num_ranks=num_ranks, ranks=tuple(range(num_ranks)), mirrored_from=num_mb // 2)
