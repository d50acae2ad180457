"""The report of several runs: their curves over each other, and one table."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from mhc_megatron.errors import UserError
from mhc_megatron.report import page
from mhc_megatron.report.charts import GAIN_BOUND, over_depth, smoothed
from mhc_megatron.report.curves import difference, moving_average, smoothing_window
from mhc_megatron.report.metrics import replace_file
from mhc_megatron.report.plots import WIDE, Line, line_chart, variant_colours
from mhc_megatron.report.run import Measure, Run, Summary, load_run, summarise
from mhc_megatron.report.table import HEADER, comparison_rows, format_table

__all__ = ["format_table", "render_comparison", "summaries", "write_comparison"]

# Differences between runs are small against the noise of a batch, so they are smoothed more than
# the losses themselves.
_DIFFERENCE_SHARE = 0.1


def write_comparison(folders: Mapping[str, Path | str], out: Path | str) -> Path:
    """Draw several runs in one page.

    Args:
        folders: run directories by the name that the page shows. The first is the baseline of the
            loss difference and of the step time.
        out: the HTML file; missing folders above it are made.

    Returns:
        ``out``. The same input gives the same bytes.

    Raises:
        UserError: no run at all, or one that cannot be read.
    """
    out = Path(out)
    text = render_comparison(_load(folders))
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, text)
    return out


def summaries(folders: Mapping[str, Path | str]) -> list[Summary]:
    """The rows of ``format_table`` for run directories by name."""
    return [summarise(name, run) for name, run in _load(folders).items()]


def render_comparison(runs: Mapping[str, Run]) -> str:
    """The HTML of ``write_comparison``."""
    names = list(runs)
    colours = variant_colours(names)
    rows = comparison_rows([summarise(name, run) for name, run in runs.items()])
    body = [
        page.section(
            "summary",
            "Summary",
            page.numbers(HEADER, rows, colours=[colours[name] for name in names]),
            page.paragraph(
                "Train loss: mean of the last 5 % of the steps. Gains and |log col|: of the "
                "composite mappings, the maximum over depth and training. Step ms: median; time "
                f"ratio: to {names[0]}."
            ),
        ),
        page.section("loss", "Loss", *_loss(runs, colours)),
        page.section("grad-norm", "Gradient norm", page.wide(_grad_norm(runs, colours))),
        *_gains(runs, colours),
    ]
    notes = [
        page.paragraph(f"{name}: {note}", kind="note")
        for name, run in runs.items()
        for note in run.notes
    ]
    title = f"Comparison: {', '.join(names)}"
    return page.page(title, heading="\n".join([f"<h1>{escape(title)}</h1>", *notes]), body=body)


def _load(folders: Mapping[str, Path | str]) -> dict[str, Run]:
    if not folders:
        raise UserError("no run folders to compare; name at least one")
    return {name: load_run(folder) for name, folder in folders.items()}


def _loss(runs: Mapping[str, Run], colours: Mapping[str, str]) -> list[str]:
    train, valid, gap = [], [], []
    baseline = next(iter(runs))
    reference = runs[baseline].curve("loss")
    for name, run in runs.items():
        curve, colour = run.curve("loss"), colours[name]
        train.append(smoothed(curve, colour=colour, label=name))
        valid.append(Line(curve=run.curve("valid_loss"), colour=colour, label=name))
        if name != baseline:
            points = difference(curve, reference)
            window = smoothing_window(len(points), share=_DIFFERENCE_SHARE)
            average = moving_average(points, window=window)
            gap.append(Line(curve=average, colour=colour, label=name))
    figures = [
        line_chart("valid-loss", valid, title="Validation loss, nats per token", log=False),
        line_chart(
            "loss-difference",
            gap,
            title=f"Training loss minus {baseline}",
            references=((0.0, baseline),),
            log=False,
        ),
    ]
    captions = ("", f"Moving average over 10 % of the steps. Below 0: better than {baseline}.")
    return [
        page.wide(
            line_chart("loss", train, title="Training loss, nats per token", log=False, size=WIDE)
        ),
        page.charts(
            *(page.figure(svg, caption=text) for svg, text in zip(figures, captions, strict=True))
        ),
    ]


def _grad_norm(runs: Mapping[str, Run], colours: Mapping[str, str]) -> str:
    lines = [
        smoothed(run.curve("grad_norm"), colour=colours[name], label=name)
        for name, run in runs.items()
    ]
    return line_chart("grad-norm", lines, title="Gradient norm before clipping", size=WIDE)


def _gains(runs: Mapping[str, Run], colours: Mapping[str, str]) -> list[str]:
    probed = {name: run for name, run in runs.items() if run.probes}
    remarks = [
        page.paragraph(f"{name}: {run.without_gains()}")
        for name, run in runs.items()
        if not run.probes
    ]
    heading = "Composite gain magnitudes"
    plain = next((name for name in runs if runs[name].residual == "plain"), "")
    references = ((1.0, plain), GAIN_BOUND)
    if not probed:
        return [page.section("gains", heading, *remarks)]
    both: Sequence[Measure] = ("forward", "backward")
    depth = [
        line_chart(
            f"depth-{measure}",
            [
                Line(
                    curve=over_depth(run.probes[-1]["composite"][measure]),
                    colour=colours[name],
                    label=name,
                )
                for name, run in probed.items()
            ],
            title=f"{measure.capitalize()}, from a sublayer to the last",
            x_label="sublayer",
            references=references,
            log=True,
        )
        for measure in both
    ]
    training = [
        line_chart(
            f"training-{measure}",
            _over_training(probed, colours, measure),
            title=f"{measure.capitalize()}, maximum over depth",
            references=references,
            log=True,
        )
        for measure in both
    ]
    log_column = line_chart(
        "training-log",
        _over_training(probed, colours, "log_column"),
        title="max |log column sum|, maximum over depth",
        log=False,
        from_zero=True,
        size=WIDE,
    )
    return [
        page.section(
            "gains-training",
            f"{heading} over training",
            *remarks,
            page.charts(*map(page.figure, training)),
        ),
        page.section(
            "gains-depth",
            f"{heading} over depth, at the last probe",
            page.charts(*map(page.figure, depth)),
        ),
        page.section(
            "log-column",
            "Attenuation of the composite mappings",
            page.paragraph("A maximum hides attenuation; |log |column sum|| does not."),
            page.wide(log_column),
        ),
    ]


def _over_training(
    runs: Mapping[str, Run], colours: Mapping[str, str], measure: Measure
) -> list[Line]:
    return [
        Line(curve=run.gain_curve("composite", measure), colour=colours[name], label=name)
        for name, run in runs.items()
    ]
