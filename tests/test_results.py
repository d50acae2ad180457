"""Figures in the documentation are those of the result files."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "benchmarks" / "results").rglob("*.jsonl"))
PROVENANCE = ("run", "gpu", "torch", "commit", "date", "benchmark", "impl", "shape", "metric")


KERNELS = ROOT / "benchmarks" / "results" / "h100" / "kernels.jsonl"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A module of benchmarks/, which is no package."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_the_performance_page_shows_the_results_file(benchmark: Callable[[str], Any]) -> None:
    tables = benchmark("kernel_table")
    lines = tables.read(KERNELS)
    page = (ROOT / "docs" / "performance.md").read_text()
    assert tables.latest(lines) in page
    assert tables.history(lines) in page


def test_the_roofline_shows_the_results_file(benchmark: Callable[[str], Any]) -> None:
    lines = benchmark("kernel_table").read(KERNELS)
    points = benchmark("roofline").points(lines)
    image = (ROOT / "docs" / "roofline.svg").read_text()
    for name, found in points.items():
        assert name in image
        for point, line in zip(
            found,
            [
                line
                for line in lines
                if line["commit"] == lines[-1]["commit"]
                and (line["impl"], line["launch"], line["metric"]) == (name, "graph", "fwd_bwd")
            ],
            strict=True,
        ):
            # Time over the limit's time is the ratio that the file states.
            limit = point.megabytes / line["copy_tb_per_s"]
            assert point.microseconds / limit == pytest.approx(line["ratio_to_floor"], rel=1e-2)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_line_says_where_it_comes_from(path: Path) -> None:
    for text in path.read_text().splitlines():
        line = json.loads(text)
        assert all(line[name] for name in PROVENANCE)
        assert line["benchmark"] == path.stem
        assert line["value"] > 0 and line["unit"]
