"""A picture of losses in bf16 and in each FP8 recipe, made from a results file.

    python benchmarks/fp8_plot.py benchmarks/results/h200/fp8_training.jsonl docs/fp8_training.svg

Of the runs with every recipe that whose losses end highest: that of the smallest learning rate, at
which runs stay together. Left: the losses of both residuals; right: what a recipe's is above that
of bf16 with the same residual.
"""

from fp8_training import CURVE, DTYPES
from kernel_table import Line
from matplotlib.figure import Figure
from multigpu_plot import PLAIN
from plot_style import command, tidy

COLOURS = dict(zip(DTYPES, ("#555555", "#0072B2", "#009E73", "#D55E00"), strict=True))
DASHES: dict[str, tuple[float, ...]] = {"mHC": (), "plain": (3, 2)}


def curves(lines: list[Line]) -> dict[tuple[str, str], list[float]]:
    """Losses, every tenth step, by residual and recipe, of the run that the picture shows.

    Raises:
        ValueError: no run has every recipe.
    """
    runs: dict[str, dict[tuple[str, str], Line]] = {}
    for line in lines:
        residual = "plain" if line["impl"] == PLAIN else "mHC"
        runs.setdefault(line["run"], {}).setdefault((residual, line["shape"]["dtype"]), line)
    whole = {(residual, dtype) for residual in DASHES for dtype in DTYPES}
    complete = [run for run in runs.values() if run.keys() == whole]
    if not complete:
        raise ValueError(f"no run has all of {', '.join(DTYPES)} with both residuals")
    # Not every line names its learning rate.
    shown = max(complete, key=lambda run: run["mHC", "bf16"]["value"])
    return {key: line["curve"] for key, line in shown.items()}


def draw(lines: list[Line]) -> Figure:
    """Two panels."""
    figure = Figure(figsize=(10.0, 3.8), layout="constrained")
    losses, differences = figure.subplots(1, 2)
    shown = curves(lines)
    for (residual, dtype), curve in shown.items():
        style = {"color": COLOURS[dtype], "dashes": DASHES[residual], "linewidth": 1.2}
        label = f"{residual}, {dtype}"
        steps = range(0, len(curve) * CURVE, CURVE)
        losses.plot(steps, curve, label=label, **style)
        if dtype != "bf16":
            bf16 = shown[residual, "bf16"]
            more = [100 * (loss / other - 1) for loss, other in zip(curve, bf16, strict=True)]
            differences.plot(steps, more, label=label, **style)
    losses.set(xlabel="step", ylabel="loss, nats per token", title="loss")
    differences.set(xlabel="step", ylabel="%", title="above bf16")
    differences.axhline(0, color="#888888", linewidth=0.7)
    for axes in (losses, differences):
        axes.legend(frameon=False, fontsize=8)
        tidy(axes)
    return figure


if __name__ == "__main__":
    command(draw, "fp8", __doc__)
