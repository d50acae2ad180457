"""What every rank of a run did last: one small file per rank, and who waits for whom.

``<run>/heartbeat/rank_00003`` holds one JSON object, padded to a fixed size and overwritten in
place: the last sign of life of rank 3. All ranks pass through the same phases in the same order, so
that of two ranks the one with the smaller ``phase`` is behind.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mhc_megatron.report.metrics import RUN_FILE, read_run

BEAT_BYTES = 512
FOLDER = "heartbeat"
HANG_FILE = "hang.txt"
FINISHED = "finished"
# A run whose ranks are all silent for as long as this hangs, or is in one long action.
SILENT_SECONDS = 60.0
_TRIES = 3  # a file that is being overwritten may be read half old and half new
_MOST_ROWS = 64
_MOST_NAMED = 4


@dataclass(frozen=True, kw_only=True)
class Beat:
    """One sign of life.

    Attributes:
        rank: of the whole run.
        host: its node.
        step: the optimizer step under way, from 1; 0 before the first.
        phase: number of phases that it has begun, the same for all ranks at the same place.
        doing: the phase or, under a pipeline schedule of ours, the action.
        waits_for: a rank whose message it needs; ``all`` in what all ranks do together; None where
            it works by itself.
        awaits: of the messages from that rank, which one: 1 is the first of the run; 0 if unknown.
        sent: how many messages have left for each rank so far.
        time: when it began, seconds since 1970 by its node's clock.
    """

    rank: int
    host: str
    step: int = 0
    phase: int = 0
    doing: str = ""
    waits_for: int | Literal["all"] | None = None
    awaits: int = 0
    sent: Mapping[int, int] = field(default_factory=dict)
    time: float = 0.0


def beat_file(folder: Path, rank: int) -> Path:
    """The file of a rank in the run directory ``folder``."""
    return folder / FOLDER / f"rank_{rank:05d}"


def encode(beat: Beat) -> bytes:
    """``BEAT_BYTES`` bytes; a host or action that does not fit is a defect."""
    text = json.dumps(vars(beat)).encode()
    assert len(text) <= BEAT_BYTES, text
    return text.ljust(BEAT_BYTES)


def read_beats(folder: Path) -> list[Beat]:
    """The last signs of life of a run's ranks, by rank; none if it has not begun."""
    return [_read(path) for path in sorted((folder / FOLDER).glob("rank_*"))]


def _read(path: Path) -> Beat:
    for _ in range(_TRIES - 1):
        try:
            return _decoded(path.read_bytes())
        except ValueError:
            continue
    return _decoded(path.read_bytes())


def _decoded(text: bytes) -> Beat:
    content = json.loads(text)
    # The names of a JSON object are text.
    sent = {int(rank): count for rank, count in content.pop("sent", {}).items()}
    return Beat(**content, sent=sent)


def waits(beats: Sequence[Beat]) -> dict[int, list[int]]:
    """For every rank, those that it waits for.

    None where it works, where nobody is behind, and where what it waits for has left the other
    rank: then that one has done its part.
    """
    by_rank = {beat.rank: beat for beat in beats}

    def of(beat: Beat) -> list[int]:
        if beat.waits_for is None:
            return []
        if beat.waits_for == "all":
            return [other.rank for other in beats if other.phase < beat.phase]
        other = by_rank.get(beat.waits_for)
        return [] if other is None or _has_sent(other, beat) else [other.rank]

    return {beat.rank: of(beat) for beat in beats}


def _has_sent(other: Beat, beat: Beat) -> bool:
    """Whether the message that ``beat`` waits for has left ``other``."""
    return 0 < beat.awaits <= other.sent.get(beat.rank, 0)


def stalled(beats: Sequence[Beat]) -> list[Beat]:
    """The ranks that the others wait for and that wait for nobody, the longest silent first.

    Of those the ones that are furthest behind. Several, if the ranks' own signs do not tell them
    apart: a tensor-parallel group within one action, or all ranks under Megatron's own schedules.
    Of ranks that wait for each other in a circle it is the one that has been silent for longest.
    """
    in_circles = {rank for ring in circles(beats) for rank in ring}
    if in_circles:
        return sorted((b for b in beats if b.rank in in_circles), key=lambda beat: beat.time)[:1]
    waiting = waits(beats)
    free = [beat for beat in beats if not waiting[beat.rank]]
    if not free:
        return sorted(beats, key=lambda beat: beat.time)[:1]
    behind = min(beat.phase for beat in free)
    return sorted((beat for beat in free if beat.phase == behind), key=lambda beat: beat.time)


def is_over(beats: Sequence[Beat]) -> bool:
    """Whether every rank has ended as it should."""
    return all(beat.doing == FINISHED for beat in beats)


def circles(beats: Sequence[Beat]) -> list[list[int]]:
    """Ranks that wait for each other in a circle, each from its smallest rank on."""
    following = waits(beats)
    found = []
    for start in sorted(following):
        path = _followed(start, following)
        if path[-1] == start and min(path) == start and len(path) > 1:
            found.append(path[:-1])
    return found


def _followed(start: int, following: Mapping[int, Sequence[int]]) -> list[int]:
    """``start``, whom it waits for, whom that one waits for, until nobody or one twice."""
    path = [start]
    while following.get(path[-1]):
        path.append(following[path[-1]][0])
        if path[-1] in path[:-1]:
            break
    return path


def summary(beats: Sequence[Beat], *, now: float) -> str:
    """One line: who is stalled, its last action, how long ago, and who waits for it, for whom.

    Args:
        beats: of all ranks, at least one.
        now: seconds since 1970.
    """
    found, waiting = stalled(beats), waits(beats)
    by_rank = {beat.rank: beat for beat in beats}

    def named(beat: Beat) -> str:
        doing = beat.doing
        if isinstance(beat.waits_for, int) and not waiting[beat.rank]:
            other = by_rank.get(beat.waits_for)
            if other is not None and _has_sent(other, beat):
                doing += ", which has left there,"
        return (
            f"rank {beat.rank} ({beat.host}) at {doing} of step {beat.step} for "
            f"{now - beat.time:.1f} s"
        )

    names = ", ".join(map(named, found[:_MOST_NAMED]))
    if len(found) > _MOST_NAMED:
        names += f" and {len(found) - _MOST_NAMED} more"
    rings = circles(beats)
    if rings:
        texts = " and ".join(_for_each_other([*ring, ring[0]]) for ring in rings[:_MOST_NAMED])
        return f"ranks wait for each other in a circle, {texts}; longest silent: {names}"
    ranks = {beat.rank for beat in found}
    others = [rank for rank in waiting if rank not in ranks and _reaches(rank, ranks, waiting)]
    text = f"stalled or gone: {names}"
    if others:
        listed = ", ".join(map(str, others[:8])) + (", ..." if len(others) > 8 else "")
        verb = "rank {} waits" if len(others) == 1 else "ranks {} wait"
        text += f"; {verb.format(listed)} for {'it' if len(found) == 1 else 'them'}"
    chains = _chains(beats, waiting)
    if chains:
        text += f": {', '.join(map(_for_each_other, chains[:_MOST_NAMED]))}"
    return text


def _chains(beats: Sequence[Beat], waiting: Mapping[int, Sequence[int]]) -> list[list[int]]:
    """Whom a rank waits for through others, from those for whose messages nobody waits."""
    following = {beat.rank: waiting[beat.rank] for beat in beats if beat.waits_for != "all"}
    awaited = {rank for ranks in following.values() for rank in ranks}
    paths = [_followed(rank, following) for rank in sorted(following) if rank not in awaited]
    return [path for path in paths if len(path) > 2]


def _for_each_other(path: Sequence[int]) -> str:
    """``[0, 1, 2]`` as ``0 for 1 for 2``; of a long one the ends."""
    names = [str(rank) for rank in path]
    if len(names) > 2 * _MOST_NAMED:
        names = [*names[:_MOST_NAMED], "...", *names[-_MOST_NAMED:]]
    return " for ".join(names)


def table(beats: Sequence[Beat], *, now: float) -> str:
    """One row per rank, the stalled ones first; at most 64."""
    waiting, first = waits(beats), {beat.rank for beat in stalled(beats)}
    order = sorted(beats, key=lambda beat: (beat.rank not in first, beat.rank))
    rows = [("rank", "node", "step", "doing", "for", "waits for rank")]
    for beat in order[:_MOST_ROWS]:
        needs = waiting[beat.rank]
        listed = ", ".join(map(str, needs[:6])) + (", ..." if len(needs) > 6 else "")
        rows.append(
            (str(beat.rank), beat.host, str(beat.step), beat.doing, f"{now - beat.time:.1f} s",
             listed or "-")
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    if len(order) > _MOST_ROWS:
        lines.append(f"and {len(order) - _MOST_ROWS} more ranks")
    return "\n".join(lines)


def describe(folder: Path, *, now: float) -> str:
    """What ``mhc-megatron status`` says of a run's ranks; empty before and after the run."""
    beats = read_beats(folder)
    if not beats or is_over(beats):
        return ""
    text = table(beats, now=now)
    silent = now - max(beat.time for beat in beats)
    if silent < SILENT_SECONDS:
        return text
    ended = (folder / RUN_FILE).is_file() and read_run(folder).status != "running"
    state = "the run has ended" if ended else f"no rank has moved for {silent:.0f} s"
    return f"{text}\n{state}; {summary(beats, now=now)}"


def _reaches(rank: int, targets: set[int], waiting: Mapping[int, Sequence[int]]) -> bool:
    """Whether ``rank`` waits, directly or through others, for one of ``targets``."""
    seen, pending = set(), [rank]
    while pending:
        here = pending.pop()
        if here in targets:
            return True
        if here not in seen:
            seen.add(here)
            pending += waiting.get(here, [])
    return False
