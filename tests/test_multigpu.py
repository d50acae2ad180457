"""benchmarks/multigpu.py on two processes: parity, its control, a killed rank; and its picture."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CASES = ("pp2_dualpipe_v", "tp2_sp_spoiled")


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By implementation and metric."""
    folder = tmp_path_factory.mktemp("multigpu")
    tiny = "--device cpu --ranks 2 --hidden 32 --seq 8 --layers 4 --patience 4 --commit tested"
    done = subprocess.run(
        [
            *(sys.executable, str(BENCHMARKS / "multigpu.py"), "--results", str(folder)),
            *("--parts", "parity,p2p,kill", "--cases", *CASES, *tiny.split()),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(text) for text in (folder / "multigpu.jsonl").read_text().splitlines()]
    return {f"{line['impl']} {line['metric']}": line for line in found}


def test_a_pipeline_has_the_bits_of_one_process(lines: dict[str, Any]) -> None:
    line = lines["mhc_megatron.pp2_dualpipe_v parity"]
    assert (line["mismatches"], line["bound"]) == (0, "exact")
    assert line["largest"] == {"gradients": 0.0, "parameters": 0.0, "losses": 0.0}
    assert line["value"] > 30 and line["unit"] == "tensors"


def test_a_missing_sum_over_ranks_is_found(lines: dict[str, Any]) -> None:
    """Without the fault the same layout is within its bound: tests/megatron/test_layouts.py."""
    line = lines["mhc_megatron.tp2_sp_spoiled parity"]
    assert line["mismatches"] > 5 and any("hyper_connection" in name for name in line["outside"])
    assert 0 < line["rounding"]["gradients"] < 1


def test_messages_are_measured_in_the_models_format_and_in_fp8(lines: dict[str, Any]) -> None:
    for name in ("mhc_megatron", "mhc_megatron.fp8", "batch_isend_irecv"):
        line = lines[f"{name} p2p_bandwidth"]
        assert line["value"] > 0 and line["shape"]["directions"] == 2


def test_a_killed_rank_ends_the_job_and_is_named(lines: dict[str, Any]) -> None:
    line = lines["mhc_megatron.zb_h1 kill"]
    assert line["problems"] == [] and line["statuses"] == [1, -9]
    assert re.match(r"pipeline rank 0 failed at ((post|recv) 1I|send 0F)\d", line["named"][0])
    assert 0 < line["value"] < line["timeout"] + 10


def test_the_picture_has_a_panel_for_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import multigpu_plot as plot

    shape = {"ranks": 2, "C": 8, "layers": 4, "schedule": "zb_h1"}
    common = {"gpu": "H", "commit": "a"}

    def step(impl: str, value: float, commit: str = "a") -> dict[str, Any]:
        line = {"impl": impl, "metric": "step", "value": value, "shape": shape}
        return {**line, **common, "commit": commit}

    found = [step("megatron_core", 9.0, "old"), step("megatron_core", 100.0)]
    found += [step("mhc_megatron.mhc", 200.0), step("mhc_megatron.mhc", 106.0)]
    assert plot.steps(found) == {
        "megatron_core": {"zb_h1": 100.0},
        "mhc_megatron.mhc": {"zb_h1": 106.0},
    }
    [axes] = plot.draw(found).axes
    assert {text.get_text() for text in axes.texts} == {"", "+6.0 %"}
    throughput = {"impl": "x", "metric": "throughput", **common}
    found += [{**throughput, "value": 5.0, "shape": {"data": 1, "C": 8}}]
    found += [{**throughput, "value": 9.0, "shape": {"data": 2, "C": 8}}]
    assert plot.scaling(found) == {"C=8, eager": {1: 5.0, 2: 9.0}}
    assert len(plot.draw(found).axes) == 2
