"""benchmarks/recompute.py, as far as a CPU goes: the stress, and what the kernels' part times."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ("--tokens", "8", "--channels", "64", "--sublayers", "8", "--commit", "tested")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A module of benchmarks/, which is no package."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "recompute.py", "--results", str(folder), *TINY]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=280, cwd=BENCHMARKS
    )


def test_the_stress_compares_every_policy(tmp_path: Path) -> None:
    done = run(tmp_path, "--parts", "stress", "--stress-steps", "7")
    assert done.returncode == 0, done.stderr
    [line] = map(json.loads, (tmp_path / "recompute_memory.jsonl").read_text().splitlines())
    assert line["shape"] == {"T": 8, "C": 64, "n": 4, "L": 8}
    assert (line["metric"], line["value"], line["steps"]) == ("steps_with_another_bit", 0, 7)
    assert line["deterministic"] is True


def test_what_needs_a_gpu_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "--parts", "kernel", "stress")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "recompute.py: error: --parts kernel: needs a GPU, and torch sees none; try --parts stress"
    )


def test_the_stress_finds_a_wrong_bit(
    benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, stress = benchmark("recompute_stage"), benchmark("recompute_stress")
    size = stage.Size(tokens=8, channels=16, sublayers=4, device="cpu")
    restore = stage.ForwardRecompute.branch_done

    def wrong(self: Any, sublayer: int, **given: Any) -> None:
        restore(self, sublayer, **given)
        self._block._mixes[-1].pre[0].mul_(1.5)

    monkeypatch.setattr(stage.ForwardRecompute, "branch_done", wrong)
    line = stress.stress_line(size, 3)
    assert line["value"] > 0 and line["deterministic"] is False


def test_the_variants_of_a_rebuild_agree(benchmark: Callable[[str], Any]) -> None:
    """Norms inside the kernel and after it give the same up to rounding; without, another.

    The first sublayer's: the others have its 1/RMS inside the kernel, which takes as long.
    """
    part = benchmark("recompute_kernel")
    size = benchmark("recompute_stage").Size(
        tokens=16, channels=32, sublayers=3, streams=2, device="cpu"
    )
    found = [part.rebuild_call(size, 3, 0, variant)() for variant in part.VARIANTS]
    assert [len(inputs) for inputs in found] == [3, 3, 3]
    alone, inside, after = (inputs[0].float() for inputs in found)
    assert torch.allclose(inside, after, rtol=2**-7, atol=2**-7)
    assert not torch.allclose(alone, inside, rtol=0.1, atol=0.1)


def test_least_bytes(benchmark: Callable[[str], Any]) -> None:
    part = benchmark("recompute_kernel")
    size = benchmark("recompute_stage").Size(tokens=10, channels=100, sublayers=2)
    # Of two sublayers x, f, one x' and two u, and all of the first's coefficients; H_pre alone of
    # the last's.
    alone = 10 * (2 * 100 * (4 + 1 + 4 + 2) + 4 * (24 + 4))
    least = {name: part.least_bytes(size, 2, name) for name in part.VARIANTS}
    assert least == {
        "rebuild": alone,
        "rebuild with norms": alone + 10 * 4 * 2,
        "rebuild, then norms": alone + 10 * 2 * 100 * 2 * 2,
    }
