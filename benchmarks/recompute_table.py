"""The tables and the picture of docs/recompute.md, made from the results files.

    python benchmarks/recompute_table.py benchmarks/results/h100 docs/recompute_memory.svg

Of a figure that was measured twice the last counts.
"""

import argparse
from pathlib import Path
from typing import Any

from kernel_table import markdown, results

from mhc_megatron.report.curves import Curve
from mhc_megatron.report.plots import BLUE, VERMILLION, Line, line_chart

Record = dict[str, Any]
_GIB = 2**30
_AS = {"eager": "", "graph": ", as one CUDA graph"}


def memory(lines: list[Record]) -> str:
    """Activations of each policy beside the formula."""
    body = [
        [
            line["impl"].removeprefix("mhc_megatron."),
            str(line["shape"]["block"] or ""),
            f"{line['value'] / _GIB:.2f}",
            f"{line['floor'] / _GIB:.2f}",
            f"{line['ratio_to_floor']:.3f}",
        ]
        for line in _latest(lines, "activations")
    ]
    return markdown(["policy", "L_r", "measured, GiB", "formula, GiB", "ratio"], body)


def time(lines: list[Record]) -> str:
    """The rebuild of a block beside its least bytes, and the step beside that of ``none``."""
    body = [
        [
            f"{line['impl'].removeprefix('mhc_megatron.')} of {line['shape']['L']}",
            f"{line['value']:.0f} us",
            f"{line['ratio_to_floor']:.2f}",
        ]
        for line in _latest(lines, "rebuild")
    ]
    body += [
        [
            f"step, {line['impl'].removeprefix('mhc_megatron.')}{_AS[line['launch']]}",
            f"{line['value']:.1f} ms",
            f"{line['ratio_to_floor']:.3f}",
        ]
        for line in _latest(lines, "step")
    ]
    return markdown(["", "time", "ratio"], body)


def draw(lines: list[Record]) -> str:
    """SVG: formula and measured activations against the block."""
    points = {
        line["shape"]["block"]: (line["value"], line["floor"])
        for line in _latest(lines, "activations")
        if line["shape"]["block"]
    }
    blocks = sorted(points)
    curves = (
        ("formula", VERMILLION, [points[block][1] / _GIB for block in blocks]),
        ("measured", BLUE, [points[block][0] / _GIB for block in blocks]),
    )
    return line_chart(
        "recompute-memory",
        [Line(curve=Curve(steps=blocks, values=v), colour=c, label=n) for n, c, v in curves],
        title="Activations of a stage, GiB",
        x_label="sublayers per block",
        log=False,
        from_zero=True,
    )


def _latest(lines: list[Record], metric: str) -> list[Record]:
    """The last line of each implementation, shape and launch."""
    found: dict[tuple[str, ...], Record] = {}
    for line in lines:
        if line["metric"] == metric:
            found[line["impl"], str(line["shape"]), str(line.get("launch"))] = line
    return list(found.values())


def folder(path: str) -> tuple[list[Record], list[Record]]:
    """The lines of memory and time, of a command's argument."""
    names = ("recompute_memory.jsonl", "recompute_time.jsonl")
    memories, times = (results(str(Path(path) / name)) for name in names)
    return memories, times


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=folder, help="a results folder")
    parser.add_argument("picture", type=Path, help="where to write it, .svg")
    args = parser.parse_args()
    measured, times = args.results
    print(memory(measured), time(times), sep="\n\n")
    args.picture.write_text(draw(measured))
