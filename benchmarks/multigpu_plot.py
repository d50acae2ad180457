"""A picture of step times, messages and scaling on several GPUs, made from a results file.

    python benchmarks/multigpu_plot.py benchmarks/results/h100/multigpu.jsonl docs/multigpu.svg

Every figure is of the last run that measured its layout, width and launch. What was not measured
leaves its panel out.
"""

from collections.abc import Callable
from typing import Any

from kernel_table import Line, with_fused_attention
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plot_style import command, tidy

COLOURS = ("#888888", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
PLAIN = "megatron_core"
VARIANTS = (
    PLAIN,
    *(f"mhc_megatron.{name}" for name in ("mhc", "mhc_recompute", "mhc_overlap", "mhc_pairs")),
)
WAYS = ("one way", "both ways")


def latest(lines: list[Line], metric: str) -> list[Line]:
    """Lines of ``metric``: of every layout, width and launch those of its last run.

    Ratios hold within a run only.
    """
    lines = with_fused_attention([line for line in lines if line["metric"] == metric])
    runs = {_work(line): line["run"] for line in lines}
    return [line for line in lines if line["run"] == runs[_work(line)]]


def _work(line: Line) -> tuple[Any, ...]:
    layout = ("schedule", "expert", "data", "directions", "ranks", "C")
    return (*(line["shape"].get(name) for name in layout), line.get("launch"))


def steps(lines: list[Line], metric: str = "step") -> dict[str, dict[str, float]]:
    """Milliseconds of a step, or of a ``stage``, by implementation and schedule.

    A schedule's name says C where there are several.
    """
    return _by_layout(lines, metric, "schedule", "{}")


def experts(lines: list[Line], metric: str = "step") -> dict[str, dict[str, float]]:
    """Likewise of expert parallelism, by implementation and layout."""
    return _by_layout(lines, metric, "expert", "EP={}")


def _by_layout(
    lines: list[Line], metric: str, layout: str, named: str
) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    timed = [line for line in latest(lines, metric) if layout in line["shape"]]
    widths = {line["shape"]["C"] for line in latest(lines, "step") if layout in line["shape"]}
    for line in timed:
        name = named.format(line["shape"][layout])
        name += f", C={line['shape']['C']}" if len(widths) > 1 else ""
        name += ", as a graph" if line.get("launch") == "graph" else ""
        found.setdefault(line["impl"], {})[name] = line["value"]
    return found


def bandwidths(lines: list[Line]) -> dict[tuple[str, str], dict[int, float]]:
    """GB/s per direction by implementation and ``WAYS``, and C."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for line in latest(lines, "p2p_bandwidth"):
        key = (line["impl"], WAYS[line["shape"]["directions"] - 1])
        found.setdefault(key, {})[line["shape"]["C"]] = line["value"]
    return found


def scaling(lines: list[Line]) -> dict[str, dict[int, float]]:
    """Tokens per second by C and launch, and data-parallel ranks, where there are several."""
    found: dict[str, dict[int, float]] = {}
    for line in latest(lines, "throughput"):
        if "data" in line["shape"]:
            name = f"C={line['shape']['C']}, {line.get('launch', 'eager')}"
            found.setdefault(name, {})[line["shape"]["data"]] = line["value"]
    return {name: rates for name, rates in found.items() if len(rates) > 1}


def draw(lines: list[Line]) -> Figure:
    """The panels for which there are figures, side by side."""
    panels: list[Callable[[Axes, list[Line]], None]] = [
        panel
        for panel, figures in (
            (_draw_steps, steps(lines)),
            (_draw_experts, experts(lines)),
            (_draw_bandwidths, bandwidths(lines)),
            (_draw_scaling, scaling(lines)),
        )
        if figures
    ]
    figure = Figure(figsize=(5.0 * len(panels), 4.4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes, lines)
        tidy(axes)
        axes.set_axisbelow(True)
        axes.margins(y=0.2)
        axes.set_ylim(bottom=0)
        if axes.get_legend_handles_labels()[1]:
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 2}
            axes.legend(frameon=False, fontsize=8, **place)
    figure.suptitle(f"{lines[-1]['gpu']}, bf16")
    return figure


def _draw_steps(axes: Axes, lines: list[Line]) -> None:
    shape = _shape(lines, "schedule")
    _draw_times(axes, steps(lines), f"PP={shape['ranks']}, {shape['layers']} layers")


def _draw_experts(axes: Axes, lines: list[Line]) -> None:
    shape = _shape(lines, "expert")
    title = f"{shape['experts']} experts over {shape['expert']} GPUs, {shape['layers']} layers"
    _draw_times(axes, experts(lines), title)


def _shape(lines: list[Line], layout: str) -> dict[str, Any]:
    """Of the first step that has this layout."""
    shapes: list[dict[str, Any]] = [line["shape"] for line in latest(lines, "step")]
    return next(shape for shape in shapes if layout in shape)


def _draw_times(axes: Axes, found: dict[str, dict[str, float]], title: str) -> None:
    layouts = list(dict.fromkeys(name for times in found.values() for name in times))
    width = 0.8 / len(found)
    colours = dict(zip(VARIANTS, COLOURS, strict=True))
    for index, (name, times) in enumerate(found.items()):
        places = [layouts.index(s) + (index - (len(found) - 1) / 2) * width for s in times]
        bars = axes.bar(places, list(times.values()), width * 0.95, color=colours[name], label=name)
        labels = [_over_plain(found, name, s) for s in times]
        axes.bar_label(bars, labels, fontsize=7, rotation=90, padding=2)
    axes.set_xticks(range(len(layouts)), [name.replace(", ", "\n") for name in layouts])
    axes.set(ylabel="step, ms (over the plain residual)", title=title)


def _over_plain(found: dict[str, dict[str, float]], name: str, schedule: str) -> str:
    plain = found.get(PLAIN, {}).get(schedule)
    if plain is None or name == PLAIN:
        return ""
    return f"{100 * (found[name][schedule] / plain - 1):+.1f} %"


def _draw_bandwidths(axes: Axes, lines: list[Line]) -> None:
    found = bandwidths(lines)
    colours = dict(zip(dict.fromkeys(name for name, _ in found), COLOURS, strict=False))
    for (name, ways), rates in found.items():
        axes.plot(
            *(list(rates), list(rates.values()), "o-" if ways == WAYS[0] else "o--"),
            color=colours[name],
            label=f"{name}, {ways}",
        )
    shape = latest(lines, "p2p_bandwidth")[0]["shape"]
    axes.set(
        xlabel="C",
        ylabel="GB/s in a direction",
        title=f"messages of {shape['T']} tokens, {shape['n']}C channels",
    )


def _draw_scaling(axes: Axes, lines: list[Line]) -> None:
    for (name, found), colour in zip(scaling(lines).items(), COLOURS[1:], strict=False):
        sizes = sorted(found)
        axes.plot(sizes, [found[size] for size in sizes], "o-", color=colour, label=name)
        linear = [found[sizes[0]] * size / sizes[0] for size in sizes]
        axes.plot(sizes, linear, color=COLOURS[0], linewidth=0.9, dashes=(1, 1.5))
    axes.set(
        xlabel="data-parallel GPUs", ylabel="tokens/s", title="weak scaling, mHC (dotted: linear)"
    )
    axes.set_xticks(sizes)


if __name__ == "__main__":
    command(draw, "multigpu", __doc__)
