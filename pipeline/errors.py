"""What goes wrong with a schedule, a cost file or a text form."""

from mhc_megatron.pipeline.actions import Compute, Overlap

_NAMED = 8  # ranks in the message of a deadlock; ``Deadlock.report`` has a line for each


class ScheduleError(ValueError):
    """Bad input; one line with the offending value and, where there is one, the remedy."""


class InvalidSchedule(ScheduleError):
    """A rank computes something wrong, twice, too early, or not at all.

    Attributes:
        rank: on which it is, or should be.
        compute: what it is.
        problem: what is wrong with it, and the remedy.
    """

    def __init__(self, name: str, rank: int, compute: Compute, problem: str) -> None:
        self.rank, self.compute, self.problem = rank, compute, problem
        super().__init__(f"{name}: rank {rank}: {compute} {problem}")


class Deadlock(ScheduleError):
    """No rank can go on. The message names the first ranks, ``report`` names all.

    Attributes:
        name: of the schedule.
        stuck: (rank, the action it waits at, the missing results that the action needs), one entry
            per rank that has not finished.
    """

    def __init__(
        self, name: str, stuck: tuple[tuple[int, Compute | Overlap, tuple[Compute, ...]], ...]
    ) -> None:
        self.name, self.stuck = name, stuck
        more = f"; and {len(stuck) - _NAMED} more ranks" if len(stuck) > _NAMED else ""
        super().__init__(f"{name}: deadlock: {'; '.join(self._lines()[:_NAMED])}{more}")

    def report(self) -> str:
        """A line for each stuck rank: its action, and what that waits for."""
        ranks = "1 rank waits" if len(self.stuck) == 1 else f"{len(self.stuck):,} ranks wait"
        return "\n".join([f"{self.name}: deadlock: {ranks}", *self._lines()])

    def _lines(self) -> list[str]:
        return [
            f"rank {rank} at {action} waits for {', '.join(str(need) for need in needs)}"
            for rank, action, needs in self.stuck
        ]
