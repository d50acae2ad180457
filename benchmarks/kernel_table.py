"""The tables of kernel times in docs/performance.md, made from a results file.

    python benchmarks/kernel_table.py benchmarks/results/h100/kernels.jsonl

Graph replays: at every shape all of the commit that was measured last, beside peers if any was,
then ``post_pre`` of every commit, then expand and the contractions as they were measured last, then
the host's times of launches without a graph. Of a figure that was measured twice the last counts.
"""

import argparse
import json
from pathlib import Path
from typing import Any

Line = dict[str, Any]
_OF_HOST = "4096, 2560, 4"
_HOST = {
    "host": "host",
    "host_stage": "host, of eight",
    "python_stage": "of eight, launched by Python",
}
_OF_LINE = ("value", "floor")
_METRICS = {"fwd": "forward", "bwd": "backward", "fwd_bwd": "both"}


def is_end(line: Line) -> bool:
    """Whether it measures expand or a contraction, which are no work of a sublayer."""
    return line["impl"].rpartition(".")[2] in ("expand", "contract_mean", "contract_learned")


def with_fused_attention(lines: list[Line]) -> list[Line]:
    """Those whose attention was fused, if any was: beside an unfused one all else looks cheap."""
    fused = [line for line in lines if line.get("attention") == "fused"]
    return fused or lines


def newest(lines: list[Line]) -> list[Line]:
    """Of every shape those of the commit that was measured last, beside peers if any was.

    Peers are named ``name==version``. Without expand and the contractions.
    """
    lines = [line for line in lines if not is_end(line)]
    commits = {_shape(line): line["commit"] for line in lines}
    commits |= {_shape(line): line["commit"] for line in lines if "==" in line["impl"]}
    return [line for line in lines if line["commit"] == commits[_shape(line)]]


def latest(lines: list[Line]) -> str:
    """Every implementation at every shape; how many times ``post_pre``'s time each needs."""
    rows: dict[tuple[str, str], dict[str, Line]] = {}
    for line in newest(lines):
        if line["launch"] == "graph":
            rows.setdefault((_shape(line), line["impl"]), {})[line["metric"]] = line
    body = []
    for (shape, implementation), row in sorted(rows.items(), key=_by_shape):
        ours = rows[shape, "mhc_megatron.post_pre"]["fwd_bwd"]["value"]
        times = f"{row['fwd_bwd']['value'] / ours:.2f}" if "fwd_bwd" in row else ""
        body.append([shape, implementation, *(_figure(row.get(m)) for m in _METRICS), times])
    head = ["T, C, n", "implementation", *_METRICS.values(), "both / post_pre's"]
    return markdown(head, body)


def history(lines: list[Line]) -> str:
    """``post_pre``, forward and backward together, by commit and shape."""
    rows: dict[str, dict[str, str]] = {}
    for line in lines:
        ours = line["impl"] == "mhc_megatron.post_pre" and line["shape"]["n"] == 4
        if ours and line["launch"] == "graph" and line["metric"] == "fwd_bwd":
            rows.setdefault(line["commit"][:7], {})[_shape(line)] = _figure(line)
    shapes = sorted({shape for row in rows.values() for shape in row}, key=_numbers)
    body = [[commit, *(row.get(shape, "") for shape in shapes)] for commit, row in rows.items()]
    return markdown(["commit", *shapes], body)


def ends(lines: list[Line]) -> str:
    """Expand and the contractions at every shape."""
    rows: dict[tuple[str, str], dict[str, Line]] = {}
    for line in lines:
        if line["launch"] == "graph" and is_end(line):
            rows.setdefault((_shape(line), line["impl"]), {})[line["metric"]] = line
    body = [[*key, *(_figure(row.get(metric)) for metric in _METRICS)] for key, row in rows.items()]
    return markdown(["T, C, n", "operation", *_METRICS.values()], body)


def host(lines: list[Line]) -> str:
    """The host's time for forward and backward, and for a function without work, at one shape.

    Of the commit that was measured last beside peers there; where it was, also by each of several
    whose backward is one.
    """
    rows: dict[str, dict[str, Line]] = {}
    for line in newest(lines):
        if line["launch"] in _HOST and _shape(line) == _OF_HOST:
            rows.setdefault(line["impl"], {})[line["launch"]] = line
    measured = [launch for launch in _HOST if any(launch in row for row in rows.values())]
    body = [
        [name, *(_microseconds(row, launch, key) for launch in measured for key in _OF_LINE)]
        for name, row in rows.items()
    ]
    head = [title for launch in measured for title in (_HOST[launch], "without work")]
    return markdown([_OF_HOST, *head], body)


def read(path: Path) -> list[Line]:
    """The lines of a results file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def results(path: str) -> list[Line]:
    """``read``, of a command's argument."""
    try:
        return read(Path(path))
    except (OSError, ValueError) as error:
        message = f"expected a results file, JSON lines, got {path}: {error}"
        raise argparse.ArgumentTypeError(message) from error


def _shape(line: Line) -> str:
    return ", ".join(str(line["shape"][name]) for name in ("T", "C", "n"))


def _by_shape(item: tuple[tuple[str, str], object]) -> tuple[int, list[int]]:
    """As they are measured: of four streams first, then by size; else as they come."""
    tokens, channels, streams = _numbers(item[0][0])
    return abs(streams - 4), [streams, tokens * channels, tokens]


def _numbers(shape: str) -> list[int]:
    return [int(number) for number in shape.split(", ")]


def _microseconds(row: dict[str, Line], launch: str, key: str) -> str:
    return f"{row[launch][key]:.0f} us" if launch in row else ""


def _figure(line: Line | None) -> str:
    """Microseconds, and in brackets the ratio to the floor."""
    return "" if line is None else f"{line['value']:.0f} ({line['ratio_to_floor']:.2f})"


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lines", type=results, help="kernels.jsonl of a results folder")
    found = parser.parse_args().lines
    print(latest(found), history(found), ends(found), host(found), sep="\n\n")
