"""A timeline as an SVG picture: one row per rank, idle time in grey.

The same timeline gives the same text.
"""

import math
from collections.abc import Iterator
from html import escape

from mhc_megatron.pipeline.actions import Compute, Op, parts
from mhc_megatron.pipeline.boxes import Box, Kind, boxes_of
from mhc_megatron.pipeline.costs import Number
from mhc_megatron.pipeline.timeline import Timeline

MAX_ROWS = 64  # more ranks are shown by a sample

# Light for the stages near the input, dark for those near the loss.
_COLOURS = {
    Op.F: ((0xA9, 0xCB, 0xEC), (0x2F, 0x6F, 0xB3)),
    Op.B: ((0x9F, 0xD8, 0xBB), (0x1D, 0x84, 0x5B)),
    Op.I: ((0xC9, 0xE3, 0x9A), (0x6C, 0x96, 0x1F)),
    Op.W: ((0xF8, 0xCF, 0x86), (0xC9, 0x7E, 0x0A)),
    Op.R: ((0xE3, 0xBB, 0xD8), (0xA6, 0x4D, 0x8B)),
}
_JOINED = "#8a97a6"
_NAMES = {
    Op.F: "F forward",
    Op.B: "B backward",
    Op.I: "I dgrad",
    Op.W: "W wgrad",
    Op.R: "R rebuild",
}
_INK, _SOFT, _IDLE, _GRID = "#222222", "#666666", "#ecece8", "#bbbbbb"

_BOX_WIDTH = 19.0  # pixels of the shortest action, where there is room
_WIDTHS = 640.0, 2400.0  # pixels of the whole timeline
_ROW, _GAP, _TOP, _LEFT, _RIGHT, _BOTTOM = 24, 4, 62, 66, 62, 40
_FONT_SIZES = 10, 8
_DIGIT = 0.61  # width of a digit in multiples of the font size
_TICK_DISTANCE = 90.0  # pixels between ticks, at least
_LEGEND_GAP = 26
_LETTER = 6.0


def to_svg(timeline: Timeline) -> str:
    """Draw a timeline.

    Boxes carry the number of their micro-batch where there is room, and the whole action as a
    tooltip; very narrow ones that touch are joined. To the right of a rank is the share of its time
    that it waits.

    Args:
        timeline: simulated or measured.

    Returns:
        An SVG document. Above 64 ranks it shows 64 of them, evenly spaced.
    """
    ranks = _rows(timeline.schedule.num_ranks)
    scale = _scale(timeline)
    across = max(float(timeline.makespan * scale), _WIDTHS[0])
    width = _LEFT + across + _RIGHT
    height = _TOP + len(ranks) * (_ROW + _GAP) + _BOTTOM
    body: list[str] = []
    shown: set[Kind] = set()
    for row, rank in enumerate(ranks):
        body += _row(timeline, rank, _TOP + row * (_ROW + _GAP), scale, shown)
    legend, legend_width = _legend(shown)
    width = max(width, legend_width)
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(width)} {height}" '
        f'width="{_n(width)}" height="{height}" '
        'font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif" font-size="10">',
        f'<rect width="{_n(width)}" height="{height}" fill="#ffffff"/>',
        f'<text x="8" y="19" font-size="13" font-weight="600" fill="{_INK}">'
        f"{escape(_title(timeline))}</text>",
    ]
    axis = _axis(timeline, scale, _TOP + len(ranks) * (_ROW + _GAP))
    return "\n".join([*head, *legend, *body, *axis, "</svg>"]) + "\n"


def time_text(value: Number, unit: str) -> str:
    """A time as people read it: ``1,234 ms``, ``12.3``."""
    if isinstance(value, int) or value == int(value):
        number = f"{int(value):,}"
    else:
        number = f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{number} {unit}".rstrip()


def _title(timeline: Timeline) -> str:
    schedule = timeline.schedule
    title = (
        f"{schedule.name}: {_count(schedule.num_ranks, 'rank')}, "
        f"{_count(schedule.num_mb, 'micro-batch')}, "
        f"step {time_text(timeline.makespan, timeline.unit)}, "
        f"bubble {timeline.bubble_fraction:.1%}"
    )
    hidden = schedule.num_ranks - len(_rows(schedule.num_ranks))
    return f"{title} ({MAX_ROWS} of the ranks are shown)" if hidden else title


def _count(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def _rows(num_ranks: int) -> list[int]:
    shown = min(num_ranks, MAX_ROWS)
    return [round(row * (num_ranks - 1) / max(1, shown - 1)) for row in range(shown)]


def _scale(timeline: Timeline) -> float:
    """Pixels per unit of time."""
    if not timeline.makespan:
        return 1.0
    spent = timeline.end - timeline.start
    shortest = float(spent[spent > 0].min())
    low, high = (width / timeline.makespan for width in _WIDTHS)
    return max(low, min(high, _BOX_WIDTH / shortest))


def _row(timeline: Timeline, rank: int, top: int, scale: float, shown: set[Kind]) -> Iterator[str]:
    middle = top + _ROW / 2 + 3.5
    across = float(timeline.makespan * scale)
    waits = timeline.bubble[rank] / timeline.makespan if timeline.makespan else 0.0
    yield (
        f'<text x="{_LEFT - 8}" y="{_n(middle)}" text-anchor="end" fill="{_INK}">rank {rank}</text>'
    )
    yield f'<rect x="{_LEFT}" y="{top}" width="{_n(across)}" height="{_ROW}" fill="{_IDLE}"/>'
    for box in boxes_of(timeline, rank, scale):
        shown.update(box.kinds)
        yield from _draw(box, top, rank)
    right = _n(_LEFT + across + 8)
    yield f'<text x="{right}" y="{_n(middle)}" fill="{_SOFT}">{waits:.1%} idle</text>'


def _draw(box: Box, top: int, rank: int) -> Iterator[str]:
    computes = (None,) if box.action is None else parts(box.action)
    width = max(box.right - box.left - (0.8 if box.right - box.left > 3 else 0), 0.3)
    height = _ROW / len(box.kinds)
    titled = box.action is not None and width >= 3
    if titled:
        yield f"<g><title>rank {rank}: {escape(str(box.action))}</title>"
    for half, (kind, compute) in enumerate(zip(box.kinds, computes, strict=True)):
        y = top + half * height
        yield (
            f'<rect x="{_n(_LEFT + box.left)}" y="{_n(y)}" width="{_n(width)}" '
            f'height="{_n(height)}" fill="{_colour(kind)}"/>'
        )
        if compute is not None:
            yield from _label(compute, kind, box.left, width, y, height)
    if titled:
        yield "</g>"


def _label(
    compute: Compute, kind: Kind, left: float, width: float, y: float, height: float
) -> Iterator[str]:
    text = str(compute.mb)
    room = [size for size in _FONT_SIZES if len(text) * size * _DIGIT + 1 <= width]
    if not room:
        return
    size = room[0] if height == _ROW else _FONT_SIZES[-1]
    attribute = f' font-size="{size}"' if size != _FONT_SIZES[0] else ""
    ink = "#ffffff" if kind.deep > 0.5 else _INK
    baseline = y + height / 2 + 0.36 * size
    yield (
        f'<text x="{_n(_LEFT + left + width / 2)}" y="{_n(baseline)}" '
        f'text-anchor="middle"{attribute} fill="{ink}">{text}</text>'
    )


def _legend(shown: set[Kind]) -> tuple[list[str], float]:
    """What the colours mean, and how wide that is."""
    lines, x = [], float(_LEFT)

    def entry(colours: list[str], text: str) -> None:
        nonlocal x
        for colour in colours:
            lines.append(f'<rect x="{_n(x)}" y="35" width="12" height="12" fill="{colour}"/>')
            x += 13
        lines.append(f'<text x="{_n(x + 4)}" y="44.5" fill="{_SOFT}">{text}</text>')
        x += len(text) * _LETTER + _LEGEND_GAP

    depths = sorted({kind.deep for kind in shown if kind.op is not None})
    for op in Op:
        kinds = [Kind(op, deep) for deep in depths if Kind(op, deep) in shown]
        if kinds:
            ends = kinds if len(kinds) < 3 else [kinds[0], kinds[-1]]
            entry([_colour(kind) for kind in ends], _NAMES[op])
    if any(kind.op is None for kind in shown):
        entry([_JOINED], "several in turn")
    entry([_IDLE], "idle")
    return lines, x


def _axis(timeline: Timeline, scale: float, top: int) -> Iterator[str]:
    step = _tick_step(_TICK_DISTANCE / scale)
    count = int(timeline.makespan / step) if timeline.makespan else 0
    unit = timeline.unit
    for tick in range(count + 1):
        x = _n(_LEFT + tick * step * scale)
        value = tick * step
        yield f'<path d="M{x} {top}v5" stroke="{_GRID}"/>'
        text = time_text(int(value) if step >= 1 else round(value, 12), unit if tick == 0 else "")
        yield f'<text x="{x}" y="{top + 17}" text-anchor="middle" fill="{_SOFT}">{text}</text>'
    yield f'<text x="8" y="{top + 17}" fill="{_SOFT}">time</text>'


def _tick_step(least: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)


def _colour(kind: Kind) -> str:
    if kind.op is None:
        return _JOINED
    light, dark = _COLOURS[kind.op]
    mixed = (round(a + (b - a) * kind.deep) for a, b in zip(light, dark, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _n(value: float) -> str:
    """A coordinate with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")
