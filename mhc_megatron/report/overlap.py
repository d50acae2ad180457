"""What a GPU's work hides behind: total, hidden and exposed time per kind, and its streams.

Times are of sets: two kernels of one kind at the same time count once.

- Communication is hidden while the GPU computes, mHC included: the links work beside the SMs.
- mHC is hidden behind compute while other compute runs, and hidden behind communication while
  communication runs; it is exposed while neither does, for then it alone makes the step longer.
  The two overlap where all three run.
- Copies and fills are hidden while anything else runs.
- Other compute is what the step is for: all of it counts as exposed.

Where only mHC and communication run, each hides the other and neither is exposed.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from mhc_megatron.pipeline.intervals import Interval, intersection, length, union
from mhc_megatron.report.gpu_kinds import Kind
from mhc_megatron.report.gpu_trace import Work

_HIDES = {
    Kind.COMMUNICATION: (Kind.COMPUTE, Kind.MHC),
    Kind.MHC: (Kind.COMPUTE, Kind.COMMUNICATION),
    Kind.COMPUTE: (),
    Kind.MEMORY: (Kind.COMPUTE, Kind.MHC, Kind.COMMUNICATION),
}


@dataclass(frozen=True, kw_only=True)
class Exposure:
    """One kind's time in nanoseconds; ``total`` is ``hidden`` plus ``exposed``."""

    total: int
    hidden: int
    exposed: int


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One stream: ``name`` is the kind that fills most of its time, ``busy`` in nanoseconds."""

    stream: int
    name: str
    count: int
    busy: int


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """The measure of one window, in nanoseconds.

    Attributes:
        window: from the first to the last of the measured work.
        idle: nothing at all runs on the GPU.
        mhc_behind_compute, mhc_behind_communication: where mHC is hidden.
    """

    window: int
    idle: int
    kinds: dict[Kind, Exposure]
    mhc_behind_compute: int
    mhc_behind_communication: int
    lanes: tuple[Lane, ...]


def measure(work: list[Work], everything: list[Work]) -> Overlap:
    """Measure ``work``, which is not empty, as ``everything`` on the same GPU hides it."""
    start, end = min(item.start for item in work), max(item.end for item in work)
    own = {kind: _times(work, kind) for kind in Kind}
    others = {kind: intersection(_times(everything, kind), [(start, end)]) for kind in Kind}

    def behind(kind: Kind, *hiding: Kind) -> int:
        cover = union(interval for other in hiding for interval in others[other])
        return length(intersection(own[kind], cover))

    kinds = {}
    for kind in Kind:
        total, hidden = length(own[kind]), behind(kind, *_HIDES[kind])
        kinds[kind] = Exposure(total=total, hidden=hidden, exposed=total - hidden)
    busy = length(union(interval for times in others.values() for interval in times))
    return Overlap(
        window=end - start,
        idle=end - start - busy,
        kinds=kinds,
        mhc_behind_compute=behind(Kind.MHC, Kind.COMPUTE),
        mhc_behind_communication=behind(Kind.MHC, Kind.COMMUNICATION),
        lanes=_lanes(work),
    )


def _times(work: Iterable[Work], kind: Kind) -> list[Interval]:
    return union((item.start, item.end) for item in work if item.kind is kind)


def _lanes(work: list[Work]) -> tuple[Lane, ...]:
    by_stream: dict[int, list[Work]] = {}
    for item in work:
        by_stream.setdefault(item.stream, []).append(item)
    lanes = []
    for stream, items in sorted(by_stream.items()):
        shares: Counter[Kind] = Counter()
        for item in items:
            shares[item.kind] += item.end - item.start
        busy = length(union((item.start, item.end) for item in items))
        name = shares.most_common(1)[0][0].value
        lanes.append(Lane(stream=stream, name=name, count=len(items), busy=busy))
    return tuple(lanes)
