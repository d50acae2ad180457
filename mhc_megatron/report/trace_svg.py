"""A recorded step as an SVG picture: one row per stream, a colour per kind of work.

A CUDA graph's work is on many streams of the driver's own, which say nothing: where there are too
many, a row is a kind of work. The same work gives the same text.
"""

from mhc_megatron.pipeline.intervals import Interval
from mhc_megatron.report.gpu_kinds import Kind
from mhc_megatron.report.gpu_trace import Work
from mhc_megatron.report.overlap import Lane

_COLOURS = {
    Kind.COMMUNICATION: "#c97e0a",
    Kind.MHC: "#a64d8b",
    Kind.COMPUTE: "#2f6fb3",
    Kind.MEMORY: "#8a97a6",
}
_LEFT, _ACROSS, _RIGHT, _TOP, _ROW, _GAP = 170, 1200, 20, 40, 24, 4
_MOST_STREAMS = 12


def to_svg(work: list[Work], lanes: tuple[Lane, ...]) -> str:
    """Draw ``work``, which is not empty, in the rows ``lanes``, or in one for each kind of it.

    Neighbours of one kind less than half a pixel apart are one box, so that the picture of a
    million kernels stays small.
    """
    start = min(item.start for item in work)
    scale = _ACROSS / max(max(item.end for item in work) - start, 1)
    rows = _rows(work, lanes)
    width, height = _LEFT + _ACROSS + _RIGHT, _TOP + len(rows) * (_ROW + _GAP) + 8
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="system-ui, sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for index, kind in enumerate(Kind):
        x = _LEFT + 150 * index
        body.append(f'<rect x="{x}" y="12" width="12" height="12" fill="{_COLOURS[kind]}"/>')
        body.append(f'<text x="{x + 18}" y="22">{kind.value}</text>')
    for row, (name, by_kind) in enumerate(rows):
        y = _TOP + row * (_ROW + _GAP)
        body.append(f'<g class="lane"><text x="8" y="{y + 16}">{name}</text>')
        body.append(f'<rect x="{_LEFT}" y="{y}" width="{_ACROSS}" height="{_ROW}" fill="#ecece8"/>')
        for kind, colour in _COLOURS.items():
            for left, right in _joined(by_kind.get(kind, []), 0.5 / scale):
                body.append(
                    f'<rect x="{_LEFT + (left - start) * scale:.2f}" y="{y}" '
                    f'width="{(right - left) * scale:.2f}" height="{_ROW}" fill="{colour}"/>'
                )
        body.append("</g>")
    return "\n".join([*body, "</svg>"]) + "\n"


def _rows(
    work: list[Work], lanes: tuple[Lane, ...]
) -> list[tuple[str, dict[Kind, list[Interval]]]]:
    """Names, and times by kind."""
    rows: dict[int | Kind, dict[Kind, list[Interval]]] = {}
    by_stream = len(lanes) <= _MOST_STREAMS
    for item in work:
        row = rows.setdefault(item.stream if by_stream else item.kind, {})
        row.setdefault(item.kind, []).append((item.start, item.end))
    if by_stream:
        return [(f"{lane.stream} {lane.name}", rows[lane.stream]) for lane in lanes]
    return [(kind.value, rows[kind]) for kind in Kind if kind in rows]


def _joined(intervals: list[Interval], distance: float) -> list[Interval]:
    joined: list[Interval] = []
    for left, right in sorted(intervals):
        if joined and left - joined[-1][1] < distance:
            joined[-1] = (joined[-1][0], max(right, joined[-1][1]))
        else:
            joined.append((left, right))
    return joined
