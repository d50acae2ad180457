"""The table of kernel times in docs/performance.md, made from a results file.

    python benchmarks/kernel_table.py benchmarks/results/h100/kernels.jsonl

Graph replays only. One row per commit, implementation and shape, in the order of the file; of a
figure that was measured twice the last counts.
"""

import json
import sys
from pathlib import Path
from typing import Any

_METRICS = ("fwd", "bwd", "fwd_bwd")
_HEAD = (
    "| commit | implementation | T, C, n | forward | backward | both |",
    "|---|---|---|---|---|---|",
)


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: microseconds, and in brackets the ratio to the floor."""
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for line in lines:
        if line["launch"] == "graph":
            shape = ", ".join(str(line["shape"][name]) for name in ("T", "C", "n"))
            row = rows.setdefault((line["commit"][:7], line["impl"], shape), {})
            row[line["metric"]] = f"{line['value']:.0f} ({line['ratio_to_floor']:.2f})"
    body = [
        f"| {' | '.join((*key, *(row.get(metric, '') for metric in _METRICS)))} |"
        for key, row in rows.items()
    ]
    return "\n".join((*_HEAD, *body))


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    print(table(read(Path(sys.argv[1]))))
