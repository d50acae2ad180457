"""The report of one run: ``report.html`` in its folder, complete in itself."""

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from mhc_megatron.report import charts, page
from mhc_megatron.report.metrics import RunInfo, replace_file
from mhc_megatron.report.pipeline import execution_section, read_execution
from mhc_megatron.report.run import Run, load_run, summarise
from mhc_megatron.report.table import MISSING, number

REPORT_FILE = "report.html"


def write_report(run_folder: Path | str) -> Path:
    """Draw a finished or running training.

    Args:
        run_folder: a run directory with metrics.jsonl and, as far as there are any, gains.jsonl
            and run.json, pipeline.json.

    Returns:
        The path of the report, ``run_folder/report.html``. It depends on the files alone: the same
        input gives the same bytes.

    Raises:
        UserError: no such folder, no or empty metrics, or a file that cannot be read.
    """
    run = load_run(run_folder)
    path = run.folder / REPORT_FILE
    replace_file(path, render_report(run))
    return path


def render_report(run: Run) -> str:
    """The HTML of ``write_report``."""
    name = run.folder.resolve().name
    sections = [_summary(name, run), _loss(run), _grad_norm(run), _speed(run), *_gains(run)]
    execution = read_execution(run.folder)
    if execution is not None:
        sections.append(execution_section(*execution))
    if run.info is not None:
        sections.append(_configuration(run.info))
    return page.page(f"{name}: training report", heading=_heading(name, run), body=sections)


def layout_text(config: Mapping[str, Any]) -> str:
    """The parallel layout in Megatron's abbreviations, such as ``TP=2 + SP, 2 processes``."""
    parallel = config.get("parallel")
    if not parallel:
        return MISSING
    short = {
        "tensor": "TP",
        "pipeline": "PP",
        "virtual": "VPP",
        "context": "CP",
        "expert": "EP",
        "data": "DP",
    }
    parts = [f"{text}={parallel[key]}" for key, text in short.items() if parallel.get(key, 1) > 1]
    if parallel.get("sequence"):
        parts[0] += " + SP"
    if parallel.get("schedule", "megatron") != "megatron":
        parts.append(parallel["schedule"])
    if parallel.get("distributed_optimizer"):
        parts.append("distributed optimizer")
    world = 1
    for key in ("tensor", "pipeline", "context", "data"):
        world *= parallel.get(key, 1)
    return ", ".join([*parts, "1 process" if world == 1 else f"{world} processes"])


def _heading(name: str, run: Run) -> str:
    info, lines = run.info, [f"<h1>{escape(name)}</h1>"]
    if info is not None:
        status = f'<span class="status {escape(info.status)}">{escape(info.status)}</span>'
        what = {"plain": "plain residual connection", "mhc": "hyper-connections"}
        text = what.get(run.residual or "", "")
        if run.residual == "mhc" and "mhc" in info.config:
            mhc = info.config["mhc"]
            text += f", {mhc.get('num_streams')} streams, projection {mhc.get('projection')}"
        lines.append(f'<p class="lead">{status} {escape(text)}</p>')
        if info.error:
            lines.append(page.paragraph(info.error, kind="note"))
    lines += [page.paragraph(note, kind="note") for note in run.notes]
    return "\n".join(lines)


def _summary(name: str, run: Run) -> str:
    info, numbers = run.info, summarise(name, run)
    steps = f"{numbers.steps:,}"
    extent = " (over depth and training)"
    planned = info.config.get("steps") if info else None
    if planned and planned != numbers.steps:
        steps += f" of {planned:,}"
    rows = [
        ("steps", steps),
        ("final training loss", _value(numbers.train_loss, 4, " (mean of the last 5 %)")),
        ("final validation loss", _value(numbers.valid_loss, 4, "")),
        ("max composite gain, forward", _value(numbers.gain_forward, 3, extent)),
        ("max composite gain, backward", _value(numbers.gain_backward, 3, extent)),
        ("max |log column sum|", _value(numbers.log_column, 3, extent)),
        ("throughput", _value(numbers.tokens_per_s, 0, " tokens/s (median)")),
        ("step time", _value(numbers.step_ms, 1, " ms (median)")),
    ]
    if numbers.joules_per_token is not None:
        rows.append(("energy", _value(numbers.joules_per_token, 4, " J per token (median)")))
    if numbers.gpu_busy is not None:
        rows.append(("GPUs busy", _value(100 * numbers.gpu_busy, 0, " % of the time (median)")))
    if run.rollbacks:
        left_out = "; ".join(
            f"step {rollback.step} left out after step {rollback.back_to} was loaded: "
            f"{rollback.problem}"
            for rollback in run.rollbacks
        )
        rows.insert(1, ("rollbacks", f"{len(run.rollbacks)} ({left_out})"))
    if info is not None:
        if info.parameters is not None:
            rows.insert(1, ("parameters", f"{info.parameters:,}"))
        rows.append(("layout", layout_text(info.config)))
        rows += [(key.replace("_", " "), str(value)) for key, value in info.environment.items()]
    return page.section("summary", "Summary", page.pairs(rows))


def _value(value: float | None, digits: int, unit: str) -> str:
    return MISSING if value is None else number(value, digits=digits) + unit


def _loss(run: Run) -> str:
    chart = page.wide(charts.loss(run), caption=_averaged(run, "loss"))
    return page.section("loss", "Loss", chart)


def _grad_norm(run: Run) -> str:
    chart = page.wide(charts.grad_norm(run), caption=_averaged(run, "grad_norm"))
    return page.section("grad-norm", "Gradient norm", chart)


def _speed(run: Run) -> str:
    both = page.charts(page.figure(charts.learning_rate(run)), page.figure(charts.throughput(run)))
    return page.section("speed", "Learning rate and throughput", both)


def _averaged(run: Run, key: str) -> str:
    points = charts.window(run.curve(key))
    return f"Bold: moving average over {points} steps." if points > 1 else ""


def _gains(run: Run) -> Iterator[str]:
    headings = {
        "gains-depth": "Gain magnitudes over depth",
        "gains-training": "Gain magnitudes over training",
        "log-column": "Attenuation: max |log column sum|",
    }
    if not run.probes:
        for name, heading in headings.items():
            yield page.section(name, heading, page.paragraph(run.without_gains()))
        return
    names = run.probes[-1]["sublayers"]
    yield page.section(
        "gains-depth",
        headings["gains-depth"],
        page.paragraph(
            "Of the token-averaged residual mappings H_res: the largest absolute row sum (forward) "
            "and column sum (backward). Left each sublayer's own, right the product of all from "
            "that sublayer to the last; the mHC paper's stay below 2. "
            f"Step {run.probes[-1]['step']:,}; sublayer 0 is "
            f"{names[0]}, sublayer {len(names) - 1} is {names[-1]}."
        ),
        page.charts(
            page.figure(charts.gains_over_depth(run, "single")),
            page.figure(charts.gains_over_depth(run, "composite")),
        ),
    )
    yield page.section(
        "gains-training",
        headings["gains-training"],
        page.charts(
            page.figure(charts.gains_over_training(run, "single")),
            page.figure(charts.gains_over_training(run, "composite")),
        ),
    )
    yield page.section(
        "log-column",
        headings["log-column"],
        page.paragraph(
            "A maximum hides attenuation: column sums of 1 and 0.01 have the maximum 1. The "
            "largest |log |column sum|| shows both directions; 0 is a mapping that keeps every sum."
        ),
        page.charts(
            page.figure(charts.log_columns_over_depth(run)),
            page.figure(charts.log_columns_over_training(run)),
        ),
    )


def _configuration(info: RunInfo) -> str:
    rows = [(key, str(value)) for key, value in _leaves(info.config, "")]
    return page.section(
        "configuration", "Configuration", page.details(f"{len(rows)} values", page.pairs(rows))
    )


def _leaves(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
