"""benchmarks/multigpu.py on two processes: parity, its control, a killed rank; and its picture."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

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


def test_a_call_takes_less_than_nine_minutes_whatever_its_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import multigpu
    from ranks import OutOfTime, Ranks

    for parts in (list(multigpu.LIMITS), ["steps"], ["parity", "kill"]):
        assert sum(multigpu.limit(parts, name) for name in parts) == pytest.approx(530)
    assert multigpu.LIMITS.keys() == multigpu.PARTS.keys()
    ranks = Ranks(2)
    ranks.begin(0.0)
    bench = multigpu.Bench(None, ranks, Path(), {})
    bench.attempt("zb_h1", lambda: iter(ranks._run(None, 60.0, print, 2)))
    assert (bench.left_out, bench.failed) == (["zb_h1"], 0)
    with pytest.raises(OutOfTime):
        ranks._run(None, 60.0, print, 2)


def test_a_case_that_no_part_has_is_refused(tmp_path: Path) -> None:
    """An overlap is a variant of experts, and a schedule of steps."""
    command = [sys.executable, str(BENCHMARKS / "multigpu.py"), "--results", str(tmp_path)]
    given = "--device cpu --ranks 2 --parts experts,steps --cases mhc_overlap 1f1b tp2"
    command.extend(given.split())
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--cases: tp2 is not one of plain, mhc, mhc_recompute, mhc_pairs" in done.stderr


@pytest.mark.parametrize(
    "only, measured",
    [
        (["mhc_overlap"], ["plain", "mhc_overlap"]),
        (None, ["plain", "mhc", "mhc_recompute", "mhc_pairs", "mhc_overlap"]),
        (["1f1b"], []),
    ],
)
def test_experts_are_measured_in_the_variants_named_beside_the_plain_residual(
    only: list[str] | None, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import multigpu_steps as part
    from step_models import size_of

    found: list[str] = []
    monkeypatch.setattr(part, "_variant_lines", lambda _, configs, __: found.extend(configs) or [])
    size = size_of("3B", hidden=32, seq=16, backend="auto", out=Path())
    list(part.expert_lines(Mock(num_ranks=2), size, "eager", num_layers=4, only=only))
    assert found == measured


def test_the_picture_has_a_panel_for_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import multigpu_plot as plot

    shape = {"ranks": 2, "C": 8, "layers": 4, "schedule": "zb_h1"}
    common = {"gpu": "H", "run": "a"}

    def step(impl: str, value: float, run: str = "a", **more: Any) -> dict[str, Any]:
        line = {"impl": impl, "metric": "step", "value": value, "shape": {**shape, **more}}
        return {**line, **common, "run": run}

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


def test_tables_say_what_hyper_connections_add_within_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import stage_tables as tables

    def line(impl: str, metric: str, value: float, run: str, **shape: Any) -> dict[str, Any]:
        shape = {"ranks": 2, "C": 8, **shape}
        return {"impl": impl, "metric": metric, "value": value, "shape": shape, "run": run}

    plain, ours = "megatron_core", "mhc_megatron.mhc"
    one = {"schedule": "zb_h1"}
    lines = [
        line(ours, "step", 999.0, "old", **one),  # of a run that was repeated
        line(plain, "step", 100.0, "a", **one),
        line(plain, "stage", 10.0, "a", **one),
        line(ours, "step", 106.0, "a", **one),
        line(ours, "stage", 10.5, "a", **one),
        line(plain, "step", 50.0, "b", schedule="dualpipe_v"),
        line(ours, "step", 60.0, "b", schedule="dualpipe_v"),
        line(plain, "step", 40.0, "b", expert=2),
        line(ours, "step", 50.0, "b", expert=2),
        line(ours, "throughput", 5.0, "b", data=1),
    ]
    assert tables.multigpu(lines).splitlines() == [
        "| schedule | plain | mhc |",
        "| --- | --- | --- |",
        "| zb_h1 | 100 ms (10.0 ms) | +6.0 % (+5.0 %) |",
        "| dualpipe_v | 50 ms | +20.0 % |",
    ]
    assert tables.multigpu_experts(lines).splitlines()[2:] == ["| EP=2 | 40 ms | +25.0 % |"]
    assert tables.scaling(lines) == {}
    lines.append(line(ours, "throughput", 9.0, "b", data=2))
    assert tables.multigpu_scaling(lines).splitlines() == [
        "| tokens/s | DP=1 | DP=2 |",
        "| --- | --- | --- |",
        "| C=8, eager | 5 (1.00) | 9 (0.90) |",
    ]
