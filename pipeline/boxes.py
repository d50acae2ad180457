"""Which boxes a picture of a timeline has: one per action, or one for many that are too narrow."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mhc_megatron.pipeline.actions import Action, Compute, Op, parts
from mhc_megatron.pipeline.placement import Placement
from mhc_megatron.pipeline.timeline import Span, Timeline

_NARROW = 2.0  # pixels below which a box is joined with the one that it touches
_TOUCH = 0.6


@dataclass(frozen=True, slots=True)
class Kind:
    """What a box shows.

    Attributes:
        op: None where several operations are joined.
        deep: how far from the input the stage is among those of its rank, 0 to 1.
    """

    op: Op | None
    deep: float


_SEVERAL = (Kind(None, 0.0),)


@dataclass(frozen=True, slots=True)
class Box:
    """A box from ``left`` to ``right``, in pixels.

    Attributes:
        kinds: one, or two for an Overlap.
        action: None where several actions are joined.
    """

    left: float
    right: float
    kinds: tuple[Kind, ...]
    action: Action | None


def boxes_of(timeline: Timeline, rank: int, pixels_per_unit: float) -> Iterator[Box]:
    """The boxes of one rank, from left to right. Actions that take no time have none."""
    stages = timeline.schedule.placement.stages_on(rank)
    each = (
        _box(timeline, stages, span, pixels_per_unit)
        for span in timeline.spans(rank)
        if span.end > span.start
    )
    # First what looks alike, so that a long run of forwards stays one; then what is still narrow.
    runs = _join(each, lambda a, b: a.kinds == b.kinds and (_is_narrow(a) or _is_narrow(b)))
    return _join(runs, lambda a, b: _is_small(a) and _is_small(b))


def _join(boxes: Iterator[Box], together: Callable[[Box, Box], bool]) -> Iterator[Box]:
    joined: Box | None = None
    for box in boxes:
        if joined is None:
            joined = box
        elif box.left - joined.right < _TOUCH and together(joined, box):
            kinds = joined.kinds if joined.kinds == box.kinds else _SEVERAL
            joined = Box(joined.left, box.right, kinds, None)
        else:
            yield joined
            joined = box
    if joined is not None:
        yield joined


def _is_narrow(box: Box) -> bool:
    return box.right - box.left < _NARROW


def _is_small(box: Box) -> bool:
    return _is_narrow(box) or box.kinds == _SEVERAL


def _box(timeline: Timeline, stages: tuple[int, ...], span: Span, scale: float) -> Box:
    placement = timeline.schedule.placement
    kinds = tuple(Kind(c.op, _deep(placement, stages, c)) for c in parts(span.action))
    return Box(float(span.start * scale), float(span.end * scale), kinds, span.action)


def _deep(placement: Placement, stages: tuple[int, ...], compute: Compute) -> float:
    if placement.mirrored_from is not None:
        return float(placement.is_mirrored(compute.mb))
    return stages.index(compute.stage) / max(1, len(stages) - 1)
