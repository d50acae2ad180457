"""What the benchmarks' pictures have in common."""

from matplotlib.axes import Axes


def tidy(axes: Axes) -> None:
    """A faint grid, and no frame but the axes."""
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
