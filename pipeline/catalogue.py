"""The schedules by name."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from mhc_megatron.pipeline.dual import dualpipe, dualpipe_v
from mhc_megatron.pipeline.errors import ScheduleError
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.schedules import gpipe, interleaved, one_f_one_b, zb_h1


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A schedule that can be asked for by name.

    Attributes:
        make: ``(num_ranks, num_mb)``.
        num_actions: of what ``make`` makes.
        summary: a few words.
    """

    make: Callable[[int, int], Schedule]
    num_actions: Callable[[int, int], int]
    summary: str


CATALOGUE = {
    "gpipe": Entry(
        make=gpipe,
        num_actions=lambda p, m: 2 * p * m,
        summary="all forwards, then all backwards",
    ),
    "one_f_one_b": Entry(make=one_f_one_b, num_actions=lambda p, m: 2 * p * m, summary="1F1B"),
    "interleaved": Entry(
        make=interleaved,
        num_actions=lambda p, m: 4 * p * m,
        summary="1F1B over several chunks per rank",
    ),
    "zb_h1": Entry(
        make=zb_h1, num_actions=lambda p, m: 3 * p * m, summary="1F1B with split backward"
    ),
    # Sums over the ranks of dual._steps.
    "dualpipe_v": Entry(
        make=dualpipe_v,
        num_actions=lambda p, m: 2 * p * m + 4 * p**2 - p + 1,
        summary="two chunks per rank in a V, split backward",
    ),
    "dualpipe": Entry(
        make=dualpipe,
        num_actions=lambda p, m: p * m + 2 * p**2 - p + 2,
        summary="two directions, two copies of the parameters",
    ),
}


def generate(name: str, *, num_ranks: int, num_mb: int, num_chunks: int | None = None) -> Schedule:
    """A schedule by name.

    Args:
        name: a key of CATALOGUE.
        num_ranks: ranks of the pipeline.
        num_mb: micro-batches of a step.
        num_chunks: stages per rank of ``interleaved``; None for its default.

    Raises:
        ScheduleError: no such schedule, or it does not admit these numbers.
    """
    entry = _entry(name)
    if num_chunks is None:
        return entry.make(num_ranks, num_mb)
    if name != "interleaved":
        raise ScheduleError(f"num_chunks={num_chunks} is for interleaved; {name} has no choice")
    return interleaved(num_ranks, num_mb, num_chunks)


def num_actions(name: str, *, num_ranks: int, num_mb: int, num_chunks: int | None = None) -> int:
    """How many actions ``generate`` would make, where it admits the numbers; takes no time.

    Raises:
        ScheduleError: no such schedule.
    """
    number = _entry(name).num_actions(num_ranks, num_mb)
    return number if num_chunks is None else number // 2 * num_chunks


def _entry(name: str) -> Entry:
    if name not in CATALOGUE:
        near = difflib.get_close_matches(name, CATALOGUE, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ScheduleError(f"unknown schedule {name!r}; {hint}known: {', '.join(CATALOGUE)}")
    return CATALOGUE[name]
