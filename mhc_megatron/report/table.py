"""Numbers as people read them, and the comparison's table."""

import math
from collections.abc import Sequence

from mhc_megatron.report.run import Summary

MISSING = "-"

HEADER = (
    "variant",
    "steps",
    "train loss",
    "valid loss",
    "gain fwd",
    "gain bwd",
    "|log col|",
    "step ms",
    "time ratio",
)


def number(value: float | None, *, digits: int = 3) -> str:
    """``value`` with ``digits`` decimals; fewer where it is large, an exponent where it is not
    readable otherwise."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1e7 or 0 < size < 0.5 * 10**-digits:
        return f"{value:.2e}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.{digits}f}"


def comparison_rows(summaries: Sequence[Summary]) -> list[list[str]]:
    """One row of texts per run, under ``HEADER``; the first run is the baseline of the time."""
    base = summaries[0].step_ms
    return [
        [
            run.name,
            f"{run.steps:,}",
            number(run.train_loss, digits=4),
            number(run.valid_loss, digits=4),
            number(run.gain_forward),
            number(run.gain_backward),
            number(run.log_column),
            number(run.step_ms, digits=1),
            number(run.step_ms / base if run.step_ms is not None and base else None, digits=2),
        ]
        for run in summaries
    ]


def format_table(rows: Sequence[Summary]) -> str:
    """The comparison for a terminal: aligned columns, names left and numbers right."""
    cells = [list(HEADER), *comparison_rows(rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADER))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
