"""What goes wrong with a schedule, a cost file or a text form."""

from mhc_megatron.pipeline.actions import Compute, Overlap

_NAMED = 32  # ranks in the message of a deadlock; all of them are in ``Deadlock.stuck``


class ScheduleError(ValueError):
    """Bad input; one line with the offending value and, where there is one, the remedy."""


class Deadlock(ScheduleError):
    """No rank can go on.

    Attributes:
        stuck: (rank, the action it waits at, the missing results that the action needs), one entry
            per rank that has not finished.
    """

    def __init__(
        self, name: str, stuck: tuple[tuple[int, Compute | Overlap, tuple[Compute, ...]], ...]
    ) -> None:
        self.stuck = stuck
        named = "; ".join(
            f"rank {rank} at {action} waits for {', '.join(str(need) for need in needs)}"
            for rank, action, needs in stuck[:_NAMED]
        )
        more = f"; and {len(stuck) - _NAMED} more ranks" if len(stuck) > _NAMED else ""
        super().__init__(f"{name}: deadlock: {named}{more}")
