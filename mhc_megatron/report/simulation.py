"""The page and the table of a pipeline timeline."""

from collections.abc import Sequence
from html import escape
from itertools import groupby

from mhc_megatron.pipeline.draw import time_text
from mhc_megatron.pipeline.timeline import Timeline
from mhc_megatron.report import page

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_HEADER = ("rank", "stages", "busy", "bubble", "bubble %", "peak live", "peak activations")
_NO_BYTES = (
    "- : no bytes are known; --hidden and --seq give them, or held_bytes and rebuilt_bytes of the "
    "stages in --costs"
)
_LONGEST = 24  # rows of a table in the terminal
_HEAD, _TAIL = 16, 4


def summary_rows(timeline: Timeline) -> list[tuple[str, str]]:
    """What a timeline comes to: names and values."""
    schedule, unit = timeline.schedule, timeline.unit
    shared = "two copies of each stage" if schedule.placement.mirrored_from is not None else ""
    stages = f"{schedule.num_stages:,}" + (f" ({shared})" if shared else "")
    return [
        ("schedule", schedule.name),
        ("ranks", f"{schedule.num_ranks:,}"),
        ("stages", stages),
        ("micro-batches", f"{schedule.num_mb:,}"),
        ("makespan", time_text(timeline.makespan, unit)),
        ("bubble", f"{timeline.bubble_fraction:.2%} of all ranks' time"),
        ("largest bubble of a rank", time_text(max(timeline.bubble), unit)),
        ("peak live micro-batches", f"{max(timeline.peak_live.tolist()):,}"),
        ("peak activations of a rank", bytes_text(max(timeline.peak_bytes.tolist()))),
    ]


def rank_rows(timeline: Timeline) -> list[tuple[str, ...]]:
    """One row of texts per rank, or per neighbouring ranks that are alike in all but stages."""
    placement, unit = timeline.schedule.placement, timeline.unit
    rows = [
        (
            time_text(busy, unit),
            time_text(bubble, unit),
            f"{bubble / timeline.makespan if timeline.makespan else 0:.2%}",
            f"{live:,}",
            bytes_text(held),
        )
        for busy, bubble, live, held in zip(
            timeline.busy,
            timeline.bubble,
            timeline.peak_live.tolist(),
            timeline.peak_bytes.tolist(),
            strict=True,
        )
    ]
    result: list[tuple[str, ...]] = []
    for row, group in groupby(range(len(rows)), key=lambda rank: rows[rank]):
        ranks = list(group)
        stages = [_stages(placement.stages_on(rank)) for rank in (ranks[0], ranks[-1])]
        several = len(ranks) > 1
        name = f"{ranks[0]} to {ranks[-1]}" if several else f"{ranks[0]}"
        held = f"{stages[0]} to {stages[1]}" if several else stages[0]
        result.append((name, held, *row))
    return result


def format_simulation(timeline: Timeline) -> str:
    """Summary and table for a terminal."""
    pairs = summary_rows(timeline)
    width = max(len(name) for name, _ in pairs)
    lines = [f"{name:<{width}}  {value}" for name, value in pairs]
    rows = [_HEADER, *rank_rows(timeline)]
    if len(rows) > _LONGEST:
        left_out = len(rows) - 1 - _HEAD - _TAIL
        gap = (f"... {left_out:,} more", *("",) * (len(_HEADER) - 1))
        rows = [*rows[: _HEAD + 1], gap, *rows[-_TAIL:]]
    note = [] if timeline.peak_bytes.any() else ["", _NO_BYTES]
    return "\n".join([*lines, "", *columns(rows), *note])


def simulation_page(timeline: Timeline, svg: str) -> str:
    """A self-contained HTML page: summary, the picture that ``to_svg`` drew, table."""
    name = timeline.schedule.name
    # Not narrower than drawn: the page scrolls rather than shrink numbers.
    start = svg.index('width="') + len('width="')
    drawn = svg[start : svg.index('"', start)]
    svg = svg.replace("<svg ", f'<svg style="min-width:{drawn}px" ', 1)
    header, rows = _HEADER, rank_rows(timeline)
    return page.page(
        f"{name}: pipeline timeline",
        heading=f'<h1>{escape(name)}</h1>\n<p class="lead">Simulated pipeline schedule</p>',
        body=[
            page.section("summary", "Summary", page.pairs(summary_rows(timeline))),
            page.section(
                "timeline",
                "Timeline",
                page.wide(
                    svg,
                    caption="Numbers are micro-batches; light for the stages near the input, dark "
                    "for those near the loss. Two in one box run as one action.",
                ),
            ),
            page.section(
                "ranks",
                "Ranks",
                page.paragraph(
                    "Peak live: the most (stage, micro-batch) pairs whose activations are there "
                    "at once, each from its forward to the end of its weight gradient."
                ),
                *([] if timeline.peak_bytes.any() else [page.paragraph(_NO_BYTES)]),
                page.numbers(header, rows, colours=["transparent"] * len(rows)),
            ),
        ],
    )


def bytes_text(number: int) -> str:
    """Bytes as people read them: ``1.50 GiB``; ``-`` for none."""
    if not number:
        return "-"
    power = min((number.bit_length() - 1) // 10, len(_UNITS) - 1)
    return f"{number} B" if power == 0 else f"{number / 1024**power:.2f} {_UNITS[power]}"


def _stages(stages: tuple[int, ...]) -> str:
    return ",".join(map(str, stages)) if len(stages) <= 3 else f"{stages[0]},..,{stages[-1]}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table for a terminal, the header first; two columns of names, then numbers."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
