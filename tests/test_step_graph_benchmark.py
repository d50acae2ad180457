"""benchmarks/step_graph.py without a GPU: every variant runs and has a line."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_every_variant_is_timed(tmp_path: Path) -> None:
    tiny = "--device cpu --hidden 32 --seq 8 --layers 2 --commit tested"
    done = subprocess.run(
        [sys.executable, "step_graph.py", "--results", str(tmp_path), *tiny.split()],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=BENCHMARKS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(text) for text in (tmp_path / "step_graph.jsonl").read_text().splitlines()]
    steps = {line["impl"]: line for line in found if line["metric"] == "step"}
    ours = ("mhc", "mhc_recompute", "mhc_pairs", "mhc_overlap")
    assert list(steps) == ["megatron_core", *(f"mhc_megatron.{name}" for name in ours)]
    for line in steps.values():
        assert line["value"] > 0 and line["launch"] == "eager"
        assert ("ratio_to_baseline" in line) is (line["impl"] != "megatron_core")
