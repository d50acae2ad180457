"""benchmarks/pipeline_gpu.py: virtual ranks of GPT chunks equal a serial run, and a fault shows."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.one_core

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_schedule_equals_the_serial_run(tmp_path: Path) -> None:
    shape = ("--ranks", "2", "--hidden", "32", "--seq", "8", "--workers", "1")
    script = str(BENCHMARKS / "pipeline_gpu.py")
    python(script, "--results", str(tmp_path), "--seeds", "2", "--commit", "tested", *shape)
    lines = [json.loads(text) for text in (tmp_path / "pipeline.jsonl").read_text().splitlines()]
    names = [line["impl"].removeprefix("mhc_megatron.") for line in lines]
    assert names == ["zb_h1", "dualpipe_v", "dualpipe"]
    for line in lines:
        assert (line["seeds"], line["mismatches"], line["deterministic"]) == (2, 0, True)
        assert line["value"] > 0 and line["serial"] > 0


def test_overlapped_schedules_equal_the_serial_run(tmp_path: Path) -> None:
    shape = ("--ranks", "2", "--hidden", "32", "--seq", "8", "--overlap", "all")
    script = str(BENCHMARKS / "pipeline_gpu.py")
    python(script, "--results", str(tmp_path), "--seeds", "3", "--commit", "tested", *shape)
    lines = [json.loads(text) for text in (tmp_path / "pipeline.jsonl").read_text().splitlines()]
    names = [line["impl"].removeprefix("mhc_megatron.") for line in lines]
    assert names == ["dualpipe_v", "dualpipe"]
    for line in lines:
        assert line["shape"]["overlap"] == "all"
        assert (line["seeds"], line["mismatches"], line["deterministic"]) == (3, 0, True)


def test_a_single_bit_and_a_nan_are_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    step = importlib.import_module("virtual_ranks").Step
    a = step(torch.tensor([1.0, 2.0]), {"w": torch.ones(3), "v": torch.zeros(2)})
    b = step(a.losses, {"w": torch.ones(3), "v": torch.tensor([0.0, 1e-30])})
    c = step(torch.tensor([1.0, float("nan")]), a.gradients)
    assert a.differences(a) == []
    assert a.differences(b) == ["v"]
    assert c.differences(c) == ["losses", "losses not finite"]
