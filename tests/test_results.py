"""Figures in the documentation are those of the result files."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "benchmarks" / "results").rglob("*.jsonl"))
PROVENANCE = ("run", "gpu", "torch", "commit", "date", "benchmark", "impl", "shape", "metric")


def kernel_table() -> Any:
    path = ROOT / "benchmarks" / "kernel_table.py"
    spec = importlib.util.spec_from_file_location("kernel_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_performance_page_shows_the_results_file() -> None:
    tables = kernel_table()
    lines = tables.read(ROOT / "benchmarks" / "results" / "h100" / "kernels.jsonl")
    page = (ROOT / "docs" / "performance.md").read_text()
    assert tables.latest(lines) in page
    assert tables.history(lines) in page


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_line_says_where_it_comes_from(path: Path) -> None:
    for text in path.read_text().splitlines():
        line = json.loads(text)
        assert all(line[name] for name in PROVENANCE)
        assert line["benchmark"] == path.stem
        assert line["value"] > 0 and line["unit"]
