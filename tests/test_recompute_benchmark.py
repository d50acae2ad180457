"""benchmarks/recompute.py, as far as a CPU goes: the stresses, and what the kernels' part times."""

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
TINY = ("--tokens", "8", "--channels", "64", "--sublayers", "4", "--commit", "tested")


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
    done = run(tmp_path, "--parts", "stress", "lanes", "--stress-steps", "12")
    assert done.returncode == 0, done.stderr
    lines = [
        json.loads(text) for text in (tmp_path / "recompute_memory.jsonl").read_text().splitlines()
    ]
    assert lines[0]["shape"] == {"T": 8, "C": 64, "n": 4, "L": 4}
    assert lines[1]["shape"] == {"model": "dense", **lines[0]["shape"]}
    assert lines[0]["cases"] == ["none", *(f"block({b})" for b in (1, 2, 4)), "auto"]
    assert lines[1]["cases"] == [
        f"{mode} {policy}"
        for mode in ("post", "recompute", "all")
        for policy in ("auto", "block(1)", "block(3)", "stage")
    ]
    for line in lines:
        assert (line["metric"], line["value"], line["steps"]) == ("steps_with_another_bit", 0, 12)
        assert line["deterministic"] is True and line["wrong_cases"] == {}
        assert line["alloc_retries"] == 0  # there is no limit here
    assert "experts on lanes are left out" in done.stderr


def test_what_needs_a_gpu_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "--parts", "kernel", "stress")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "recompute.py: error: --parts kernel: needs a GPU, and torch sees none; "
        "try --parts stress lanes"
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
    line = stress.stress_line(size, 5)
    assert line["cases"] == ["none", "block(1)", "block(2)", "block(4)", "auto"]
    assert line["wrong_cases"] == {"block(1)": 1, "block(2)": 1, "block(4)": 1, "auto": 1}
    assert line["value"] == 4 and line["deterministic"] is False


# In a process of its own: Megatron's groups are made and unmade.
WRONG_ON_LANES = """
import json
from alone import one_process
from mhc_megatron import recompute
from recompute_lanes import lanes_line
from te_blocks import Size
keep = recompute._without_graph
def wrong(mix):
    mix = keep(mix)
    return mix._replace(pre=mix.pre * 1.5)
recompute._without_graph = wrong
size = Size(name="dense", channels=64, heads=8, ffn=64, blocks=2, tokens=4)
with one_process():
    print(json.dumps(lanes_line(size, 12, engine=False)["wrong_cases"]))
"""


def test_the_stress_on_lanes_finds_a_wrong_bit() -> None:
    command = [sys.executable, "-W", "ignore", "-c", WRONG_ON_LANES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    wrong = json.loads(done.stdout.splitlines()[-1])
    assert len(wrong) == 12 and set(wrong.values()) == {1}


def test_a_case_gets_what_it_needs_and_a_margin(
    benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1000 bytes are there, a step takes 500 more, of a GPU of 10000."""
    pressure = benchmark("allocator_pressure")
    fractions: list[float] = []
    for name, result in {
        "is_available": True,
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 1000,
        "max_memory_allocated": 1500,
        "mem_get_info": (0, 10_000),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda result=result: result)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    thief = pressure.Thief(torch.device("cpu"), [None])
    made = 0

    def make() -> Callable[[], bool]:
        nonlocal made
        made += 1

        def run() -> bool:
            if thief.active and made < 3:  # the first two are short of memory
                raise torch.OutOfMemoryError("too little")
            return thief.active

        return run

    case = pressure.Pressure(make, thief)
    assert fractions == [] and made == 1
    assert case() is True and not thief.active
    margins = (0.05, 0.10, 0.15)
    assert fractions[::2] == pytest.approx([(1000 + 500 * (1 + m)) / 10_000 for m in margins])
    assert fractions[1::2] == [1.0] * 3
    assert (made, case.out_of_memory, case.margin) == (3, 2, pytest.approx(0.15))
    case._run = lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("never enough"))
    case.margin = pressure.MOST_MARGIN
    with pytest.raises(torch.OutOfMemoryError, match="never enough"):
        case()
    assert fractions[-1] == 1.0


def test_a_thief_takes_while_it_may(
    benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    thief = benchmark("allocator_pressure").Thief(torch.device("cpu"), [None])
    taken: list[int] = []

    def full(size: tuple[int], value: float, device: torch.device) -> None:
        assert value != value  # NaN
        taken.append(*size)
        if len(taken) % 2:
            raise torch.OutOfMemoryError("too little")

    monkeypatch.setattr(torch, "full", full)
    assert [thief.observe(max, number, 2) for number in range(4)] == [2, 2, 2, 3]
    assert taken == []
    thief.active = True
    assert [thief.observe(max, number, 2) for number in range(400)][-1] == 399
    assert 150 < len(taken) < 250
    assert thief.refused == -(-len(taken) // 2)
    assert min(taken) >= 1 and max(taken) > 2**11


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
