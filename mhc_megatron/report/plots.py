"""One kind of picture, drawn well: lines over a horizontal axis, as deterministic SVG text.

Every line carries its name at its end instead of in a legend. The colours are Okabe and Ito's,
which colour-blind readers can tell apart.
"""

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.style
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mhc_megatron.report.curves import Curve, moving_average

BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, ORANGE, SKY, GREY = "#CC79A7", "#E69F00", "#56B4E9", "#666666"
_INK, _GRID, _REFERENCE = "#333333", "#e6e6e6", "#888888"

WIDE, HALF = (10.4, 3.2), (5.1, 3.0)  # inches at 72 units each

_STYLE = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "font.sans-serif": ["DejaVu Sans"],  # measured with; the page shows its own font
    "font.size": 9,
    "axes.edgecolor": "#bbbbbb",
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 9,
    "axes.titlecolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.3,
    "lines.solid_capstyle": "round",
}
_LABEL_SIZE = 8.5
_LONGEST = 18  # characters of a label
_DOTS = (0, (1, 1.5))
_ROUND = [1, 2, 5, 10]  # ticks at multiples of these
_FEW = 40  # points that still deserve a marker each
_LARGEST = 1e100  # margins on a logarithmic axis overflow near float64's own end
_LOG_RATIO = 30  # largest over smallest value from which a linear axis hides the small ones


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart.

    Attributes:
        curve: its points; those that are not finite leave gaps, and the chart says how many.
        colour: as #rrggbb.
        label: written at its end; empty for none.
        window: points of a moving average, an odd number. Above 1 the average is drawn over the
            values, which become faint.
    """

    curve: Curve
    colour: str
    label: str = ""
    window: int = 1


def line_chart(
    name: str,
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str = "step",
    references: Sequence[tuple[float, str]] = (),
    log: bool | None = None,
    from_zero: bool = False,
    size: tuple[float, float] = HALF,
) -> str:
    """Draw a chart.

    Args:
        name: prefix of the identifiers in the SVG; different for every chart of a page.
        lines: what to draw; a line without points is left out.
        title: what the vertical axis shows, with its unit.
        x_label: what the horizontal axis shows.
        references: (height, text) of dotted horizontal lines that are always in view.
        log: logarithmic vertical axis; None takes one if the values span a factor above 30.
        from_zero: a linear vertical axis begins at 0.
        size: inches, ``WIDE`` or ``HALF``.

    Returns:
        An ``<svg>`` element that scales to its container; the same bytes for the same input.
    """
    lines = [line for line in lines if len(line.curve)]
    values = [value for line in lines for value in line.curve.values]
    if log is None:
        log = _spans_decades(values)
    hidden = sum(not _drawable(value, log=log) for value in values)
    if hidden:
        what = "0 or not finite" if log else "not finite"
        x_label += f" ({hidden} of {len(values)} values are {what})"
    with matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": name}]):
        figure = Figure(figsize=size)
        axes = figure.add_subplot()
        axes.set_title(title)
        axes.set_xlabel(x_label if lines else "nothing recorded", fontsize=_LABEL_SIZE)
        if log:
            axes.set_yscale("log", nonpositive="mask")
        for line in lines:
            _draw(axes, line, log=log)
        for height, _ in references:
            axes.axhline(height, color=_REFERENCE, linewidth=0.9, linestyle=_DOTS, zorder=1)
        steps = [step for line in lines for step in line.curve.steps]
        _scale_steps(axes, steps, bins=round(1.1 * size[0]) + 1)
        _scale_values(axes, log=log, from_zero=from_zero)
        _leave_margins(figure, [line.label for line in lines] + [text for _, text in references])
        _label_ends(axes, lines, references, log=log)
        return _svg(figure, name=name, title=title)


def variant_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour per variant: always the same for the usual names, then the unused ones in order."""
    usual = {"plain": GREY, "hc": VERMILLION, "mhc": BLUE}
    chosen = {name: usual[name] for name in names if name in usual}
    spare = [GREEN, PURPLE, ORANGE, SKY, BLUE, VERMILLION, GREY]
    spare = [colour for colour in spare if colour not in chosen.values()]
    others = [name for name in names if name not in chosen]
    return chosen | {name: spare[index % len(spare)] for index, name in enumerate(others)}


def _drawable(value: float, *, log: bool) -> bool:
    return abs(value) < _LARGEST and (value > 1 / _LARGEST or not log)  # false for NaN


def _spans_decades(values: Sequence[float]) -> bool:
    drawn = [value for value in values if _drawable(value, log=False)]
    return bool(drawn) and min(drawn) > 0 and max(drawn) / min(drawn) > _LOG_RATIO


def _draw(axes: Axes, line: Line, *, log: bool) -> None:
    few = len(line.curve) <= _FEW
    if line.window == 1:
        _plot(axes, line.curve, line.colour, log=log, marker="o" if few else "", markersize=2.6)
        return
    _plot(axes, line.curve, line.colour, log=log, alpha=0.3, linewidth=0.7)
    _plot(axes, moving_average(line.curve, window=line.window), line.colour, log=log)


def _plot(axes: Axes, curve: Curve, colour: str, *, log: bool, **style: Any) -> None:
    # NaN leaves a gap.
    values = [value if _drawable(value, log=log) else math.nan for value in curve.values]
    axes.plot(curve.steps, values, color=colour, zorder=2, **style)


def _scale_steps(axes: Axes, steps: Sequence[float], *, bins: int) -> None:
    """The horizontal axis: all that was recorded, drawn or not."""
    if not steps:
        axes.set_xticks([])
        axes.set_yticks([])
        return
    first, last = min(steps), max(steps)
    margin = 0.02 * (last - first) or 1
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(
        ticker.MaxNLocator(bins, steps=_ROUND, integer=True, min_n_ticks=1)
    )
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))


def _scale_values(axes: Axes, *, log: bool, from_zero: bool) -> None:
    axes.margins(y=0.08)
    low, high = axes.get_ylim()
    if from_zero and not log:
        low, high = axes.set_ylim(0, 1.03 * high)
    if log:
        subs = (1, 2, 5) if high / low < 100 else (1,)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    elif axes.get_yticks().size:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(6, steps=_ROUND))
    largest = max(abs(low), abs(high))
    if log or not 1e-4 <= largest < 1e5:
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    else:
        plain = ticker.ScalarFormatter(useOffset=False)
        plain.set_scientific(False)
        axes.yaxis.set_major_formatter(plain)


def _leave_margins(figure: Figure, labels: Sequence[str]) -> None:
    """Fixed margins, so that charts below each other line up; the right one fits the labels."""
    width, height = figure.get_size_inches()
    right = 0.12 + 0.075 * max((len(_shortened(label)) for label in labels), default=0)
    figure.subplots_adjust(
        left=0.58 / width, right=1 - right / width, top=1 - 0.36 / height, bottom=0.46 / height
    )


def _label_ends(
    axes: Axes, lines: Sequence[Line], references: Sequence[tuple[float, str]], *, log: bool
) -> None:
    """Write every label beside its line's last point, moved apart where they would overlap."""
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [(height, text, _REFERENCE) for height, text in references if text]
    for line in lines:
        curve = moving_average(line.curve, window=line.window)
        drawn = [value for value in curve.values if _drawable(value, log=log)]
        if line.label and drawn:
            ends.append((drawn[-1], line.label, line.colour))
    ends.sort(key=lambda end: end[0])
    heights = [float(to_axes.transform((0, value))[1]) for value, _, _ in ends]
    gap = 1.25 * _LABEL_SIZE / (72 * axes.bbox.height / axes.figure.dpi)
    for (_, text, colour), height in zip(ends, spread(heights, gap=gap), strict=True):
        axes.annotate(
            _shortened(text),
            (1, height),
            xycoords="axes fraction",
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=_LABEL_SIZE,
            color=colour,
            annotation_clip=False,
        )


def _shortened(label: str) -> str:
    return label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…"


def spread(heights: Sequence[float], *, gap: float) -> list[float]:
    """Ascending heights moved as little as needed to be ``gap`` apart, if they fit in [0, 1]."""
    # Each block of labels that touch stands around the mean of what they want.
    blocks: list[list[float]] = []
    for height in heights:
        blocks.append([height])
        while len(blocks) > 1 and _bottom(blocks[-1], gap) < _top(blocks[-2], gap) + gap:
            last = blocks.pop()
            blocks[-1] += last
    return [_bottom(block, gap) + gap * index for block in blocks for index in range(len(block))]


def _bottom(block: Sequence[float], gap: float) -> float:
    extent = gap * (len(block) - 1)
    return max(0.0, min(1.0 - extent, sum(block) / len(block) - extent / 2))


def _top(block: Sequence[float], gap: float) -> float:
    return _bottom(block, gap) + gap * (len(block) - 1)


def _svg(figure: Figure, *, name: str, title: str) -> str:
    buffer = io.StringIO()
    # Without these entries there is no date and no link in the file.
    empty = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", metadata=empty)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    # Identifiers are unique within a page, and the size comes from the container.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    opening = re.sub(r' (width|height)="[^"]*"', "", text[: text.index(">")])
    label = html.escape(title, quote=True)
    return f'{opening} role="img" aria-label="{label}"{text[text.index(">") :]}\n'
