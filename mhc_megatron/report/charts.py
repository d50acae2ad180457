"""The charts of a single run."""

from mhc_megatron.report.curves import Curve, smoothing_window
from mhc_megatron.report.plots import BLUE, GREEN, GREY, VERMILLION, WIDE, Line, line_chart
from mhc_megatron.report.run import Kind, Measure, Run

# Below this many steps the raw curve is readable, and a mean over a few steps would blur it.
_SMOOTH_FROM = 60
_SMOOTH_SHARE = 0.03

# The mHC paper's composite mappings stay below 2 (its largest is about 1.6).
GAIN_BOUND = (2.0, "bound 2")
_GAIN_REFERENCES = ((1.0, ""), GAIN_BOUND)

_MEASURES: tuple[tuple[Measure, str, str], ...] = (
    ("forward", BLUE, "forward"),
    ("backward", VERMILLION, "backward"),
)


def window(curve: Curve) -> int:
    """Points of the moving average that is drawn over a training curve; 1 for none."""
    if len(curve) < _SMOOTH_FROM:
        return 1
    return smoothing_window(len(curve), share=_SMOOTH_SHARE)


def smoothed(curve: Curve, *, colour: str, label: str = "") -> Line:
    """A training curve with its moving average over it."""
    return Line(curve=curve, colour=colour, label=label, window=window(curve))


def loss(run: Run) -> str:
    """Training and validation loss."""
    lines = [
        smoothed(run.curve("loss"), colour=BLUE, label="train"),
        Line(curve=run.curve("valid_loss"), colour=VERMILLION, label="validation"),
    ]
    return line_chart("loss", lines, title="Loss, nats per token", log=False, size=WIDE)


def grad_norm(run: Run) -> str:
    """Global gradient norm before clipping."""
    lines = [smoothed(run.curve("grad_norm"), colour=GREEN)]
    return line_chart("grad-norm", lines, title="Gradient norm before clipping", size=WIDE)


def learning_rate(run: Run) -> str:
    """The schedule as it was applied."""
    lines = [Line(curve=run.curve("lr"), colour=GREY)]
    return line_chart("lr", lines, title="Learning rate", log=False, from_zero=True)


def throughput(run: Run) -> str:
    """Tokens per second of every step."""
    tokens = run.curve("tokens_per_s")
    thousands = Curve(steps=tokens.steps, values=[value / 1000 for value in tokens.values])
    lines = [smoothed(thousands, colour=GREY)]
    title = "Throughput, thousand tokens/s"
    return line_chart("throughput", lines, title=title, log=False, from_zero=True)


def gains_over_depth(run: Run, kind: Kind) -> str:
    """Forward and backward gains per sublayer at the last probe."""
    probe = run.probes[-1]
    lines = [
        Line(curve=over_depth(probe[kind][measure]), colour=colour, label=label)
        for measure, colour, label in _MEASURES
    ]
    title = {"single": "Single mapping", "composite": "Product from here to the last sublayer"}
    return line_chart(
        f"depth-{kind}",
        lines,
        title=title[kind],
        x_label="sublayer",
        references=_GAIN_REFERENCES,
    )


def gains_over_training(run: Run, kind: Kind) -> str:
    """The maximum over depth of the forward and backward gains, per probe."""
    lines = [
        Line(curve=run.gain_curve(kind, measure), colour=colour, label=label)
        for measure, colour, label in _MEASURES
    ]
    title = {"single": "Single mappings", "composite": "Composite products"}
    return line_chart(
        f"training-{kind}",
        lines,
        title=f"{title[kind]}, maximum over depth",
        references=_GAIN_REFERENCES,
    )


def log_columns_over_depth(run: Run) -> str:
    """max |log column sum| per sublayer at the last probe."""
    kinds: tuple[tuple[Kind, str], ...] = (("single", GREY), ("composite", BLUE))
    lines = [
        Line(curve=over_depth(run.probes[-1][kind]["log_column"]), colour=colour, label=kind)
        for kind, colour in kinds
    ]
    title = "At the last probe"
    return line_chart(
        "depth-log", lines, title=title, x_label="sublayer", log=False, from_zero=True
    )


def log_columns_over_training(run: Run) -> str:
    """The maximum over depth of max |log column sum|, per probe."""
    kinds: tuple[tuple[Kind, str], ...] = (("single", GREY), ("composite", BLUE))
    lines = [
        Line(curve=run.gain_curve(kind, "log_column"), colour=colour, label=kind)
        for kind, colour in kinds
    ]
    title = "During training, maximum over depth"
    return line_chart("training-log", lines, title=title, log=False, from_zero=True)


def over_depth(values: list[float]) -> Curve:
    """Values per sublayer, the first sublayer at 0."""
    return Curve(steps=list(range(len(values))), values=values)
