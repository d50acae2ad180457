"""A forecast of an Overlap as an SVG picture: a row per lane."""

from html import escape

from mhc_megatron.pipeline.forecast import Forecast
from mhc_megatron.pipeline.phases import Lane

_COLOURS = {"F": "#6fa3d8", "B": "#57b58c", "W": "#eba43c", "R": "#c07aab"}
_NAMES = {"F": "forward", "B": "dgrad", "W": "wgrad", "R": "rebuild"}
_WIDTH, _LEFT, _RIGHT, _TOP, _ROW, _GAP = 1100.0, 110, 20, 60, 30, 6
_LETTER = 6.0


def lanes_to_svg(forecast: Forecast, title: str) -> str:
    """Draw it. A box names its phase where there is room, and always as a tooltip.

    Args:
        forecast: of an Overlap.
        title: above the picture.

    Returns:
        An SVG document; the same forecast gives the same text.
    """
    scale = _WIDTH / forecast.length if forecast.length else 0.0
    width, height = _LEFT + _WIDTH + _RIGHT, _TOP + len(Lane) * (_ROW + _GAP) + 10
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        f'width="{width:.0f}" height="{height}" '
        'font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif" font-size="10">',
        f'<rect width="{width:.0f}" height="{height}" fill="#ffffff"/>',
        f'<text x="8" y="19" font-size="13" font-weight="600">{escape(title)}</text>',
    ]
    for place, (op, name) in enumerate(_NAMES.items()):
        x = _LEFT + 90 * place
        lines.append(f'<rect x="{x}" y="32" width="12" height="12" fill="{_COLOURS[op]}"/>')
        lines.append(f'<text x="{x + 17}" y="42">{name}</text>')
    rows = {lane: _TOP + row * (_ROW + _GAP) for row, lane in enumerate(Lane)}
    for lane, top in rows.items():
        lines.append(f'<text x="{_LEFT - 8}" y="{top + 19}" text-anchor="end">{lane.value}</text>')
        lines.append(
            f'<rect x="{_LEFT}" y="{top}" width="{_WIDTH:.0f}" height="{_ROW}" fill="#ecece8"/>'
        )
    for span in forecast.spans:
        left, across = _LEFT + span.start * scale, (span.end - span.start) * scale
        if not across:
            continue
        top, text = rows[span.lane], str(span.phase)
        lines.append(
            f"<g><title>{_NAMES[span.step.op]} {escape(text)}: {span.start:g} to {span.end:g}"
            f'</title><rect x="{left:.1f}" y="{top}" width="{max(across - 0.8, 0.3):.1f}" '
            f'height="{_ROW}" fill="{_COLOURS[span.step.op]}"/>'
        )
        if len(text) * _LETTER < across:
            lines.append(f'<text x="{left + 3:.1f}" y="{top + 19}">{escape(text)}</text>')
        lines.append("</g>")
    return "\n".join([*lines, "</svg>"]) + "\n"
