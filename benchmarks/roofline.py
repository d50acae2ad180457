"""A picture of kernel times against the bandwidth of a copy, made from a results file.

    python benchmarks/roofline.py benchmarks/results/h100/kernels.jsonl docs/roofline.svg

Forward and backward together, graph replays, of every shape the commit that was measured last.
Right: the bytes that an implementation has to move at least; up: its time. A point on the line
moves no byte twice.
"""

from typing import NamedTuple

from kernel_table import Line, newest
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from plot_style import command, tidy

MARKERS = "os^Dv"
COLOURS = ("#0072B2", "#009E73", "#56B4E9", "#D55E00", "#CC79A7")
MULTIPLES = (1.0, 2.0, 3.0)


class Point(NamedTuple):
    """``megabytes`` at least, in ``microseconds``."""

    megabytes: float
    microseconds: float


def points(lines: list[Line]) -> dict[str, list[Point]]:
    """By implementation, in the order of the file."""
    found: dict[str, list[Point]] = {}
    for line in newest(lines):
        if (line["launch"], line["metric"]) == ("graph", "fwd_bwd"):
            megabytes = line["floor"] * line["copy_tb_per_s"]
            found.setdefault(line["impl"], []).append(Point(megabytes, line["value"]))
    return found


def draw(lines: list[Line]) -> Figure:
    """Logarithmic axes, on which every multiple of the limit is a parallel line."""
    figure = Figure(figsize=(9.0, 5.0), layout="constrained")
    axes = figure.subplots()
    series = points(lines)
    bandwidth = newest(lines)[-1]["copy_tb_per_s"]
    sizes = sorted(point.megabytes for found in series.values() for point in found)
    span = (sizes[0] * 0.8, sizes[-1] * 1.25)
    for multiple in MULTIPLES:
        times = [multiple * size / bandwidth for size in span]
        axes.plot(
            span, times, color="#888888", linewidth=0.9, dashes=(1, 1.5) if multiple > 1 else ()
        )
        axes.annotate(f" {multiple:g} x", (span[1], times[1]), va="center", color="#666666")
    for (name, found), marker, colour in zip(series.items(), MARKERS, COLOURS, strict=False):
        xs, ys = [p.megabytes for p in found], [p.microseconds for p in found]
        axes.plot(xs, ys, marker, color=colour, label=name, markersize=6)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="bytes that have to be moved, MB",
        ylabel="forward and backward, µs",
        title=f"{lines[-1]['gpu']}, a copy moves {bandwidth:.2f} TB/s: multiples of its time",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.legend(frameon=False)
    tidy(axes)
    return figure


if __name__ == "__main__":
    command(draw, "roofline", __doc__)
