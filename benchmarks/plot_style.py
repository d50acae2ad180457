"""What the benchmarks' pictures have in common."""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib
from kernel_table import Line, results
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def tidy(axes: Axes) -> None:
    """A faint grid, and no frame but the axes."""
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def command(draw: Callable[[list[Line]], Figure], name: str, description: str) -> None:
    """Of a script: draws the lines of a results file. ``name`` makes a picture's identifiers, so
    that the same figures are the same file."""
    matplotlib.rcParams.update({"svg.hashsalt": name, "svg.fonttype": "none"})
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("lines", type=results, help="a results file, JSON lines")
    parser.add_argument("picture", type=Path, help="where to write it, .svg or .png")
    args = parser.parse_args()
    draw(args.lines).savefig(args.picture, metadata={"Date": None})
