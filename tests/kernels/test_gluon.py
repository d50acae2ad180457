"""Hopper's own kernels compute what the reference does, on an interpreter that waits as they do."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.fused import Case, compare, operands
from helpers.gluon_interpreter import hopper_interpreted
from triton.runtime.errors import InterpreterError

from mhc_megatron.kernels.triton import hopper_tiles
from mhc_megatron.kernels.triton.tiles import Tiles, default_tiles

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled where there is a GPU"
)
CPU = torch.device("cpu")
# Steps of 64, the last in part, and more of them than stages; of 264 channels as well.
TOKENS = 208
FORWARD, BACKWARD, WEIGHT = "hopper_mix_fwd", "hopper_pre_bwd", "hopper_weight_bwd"


def tiles_of(case: Case, span: int | None = None) -> Tiles:
    """With programs of all channels, or of as many as ``span``; and more steps than stages."""
    tiles = default_tiles(case.n, case.tokens, case.channels, case.dtype)
    if tiles.hopper_weight is not None:
        few = replace(tiles.hopper_weight, num_stages=2)
        tiles = replace(tiles, hopper_weight=few, hopper_weight_split=192)
    if tiles.hopper_mix is None:
        # The interpreter's time is a program's.
        return replace(tiles, post_backward=replace(tiles.post_backward, tokens=64))
    return replace(tiles, hopper_mix=replace(tiles.hopper_mix, span=span))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    with hopper_interpreted(monkeypatch) as names:
        yield names


CASES = [
    Case(operation="pre", n=1, channels=72),
    Case(operation="pre", n=2, channels=72),
    Case(operation="pre", n=8, channels=72),
    Case(operation="post_pre", n=8, channels=72),
    Case(operation="single_pass", n=8, channels=72),
    Case(operation="post_pre", n=1, channels=72),
    Case(operation="post_pre", n=2, channels=264),
    Case(operation="pre", channels=264),
    Case(operation="pre", channels=72, norm=True),
    Case(operation="pre", channels=72).with_projection("permutation"),
    Case(operation="pre", channels=72).with_projection("identity"),
    Case(operation="post_pre", channels=264),
    Case(operation="post_pre", channels=72, branch_bias=True),
    Case(operation="single_pass", channels=264),
]


def named(case: Case) -> str:
    parts = [case.operation, str(case.n), str(case.channels)]
    parts += ["norm"] * case.norm + ["bias"] * case.branch_bias
    if case.options.projection != "sinkhorn":
        parts.append(case.options.projection)
    return "-".join(parts)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_all_results_and_gradients(case: Case, launched: list[str]) -> None:
    case = replace(case, tokens=TOKENS, dtype=torch.bfloat16)
    compare(case, operands(case, CPU), tiles=tiles_of(case))
    backward = {BACKWARD if case.operation == "pre" or case.n == 8 else WEIGHT}
    assert set(launched) == backward | ({FORWARD} if case.n == 4 else set())


def test_programs_that_share_the_channels_of_a_token(launched: list[str]) -> None:
    case = Case(operation="post_pre", tokens=TOKENS, channels=264, dtype=torch.bfloat16)
    compare(case, operands(case, CPU), tiles=tiles_of(case, span=192))


# What the kernels that forget to wait are given.
OF_FORWARD = {"tokens": 16, "channels": 264}
OF_BACKWARD = {"tokens": TOKENS, "channels": 72}


@pytest.mark.parametrize(
    ("operation", "sizes"),
    [
        ("post_pre", OF_FORWARD),
        ("pre", OF_FORWARD),
        ("pre", OF_BACKWARD),
        ("post_pre", OF_BACKWARD),
    ],
)
def test_what_is_waited_for_is_right(
    operation: str, sizes: dict[str, int], launched: list[str]
) -> None:
    case = Case(operation=operation, dtype=torch.bfloat16, **sizes)
    compare(case, operands(case, CPU), tiles=tiles_of(case))


PRODUCTS = "projected = warpgroup_mma_wait(num_outstanding=0, deps=(projected,))"
OF_HEAD = "head = warpgroup_mma_wait(num_outstanding=0, deps=(head,))"


@pytest.mark.parametrize(
    ("operation", "name", "right", "wrong"),
    [
        ("post_pre", "mix_forward", "wait_group(STAGES - 2)", "wait_group(STAGES - 1)"),
        ("post_pre", "mix_forward", "fence_async_shared()\n            barrier", "barrier"),
        (
            "post_pre",
            "mix_forward",
            f"    if HAS_POST:\n            {PRODUCTS}",
            "    if HAS_POST:",
        ),
        ("post_pre", "mix_forward", "number + STAGES - 1", "number + STAGES"),
        ("pre", "mix_forward", "fence_async_shared()\n        barrier", "barrier"),
        (
            "pre",
            "mix_forward",
            f"            {PRODUCTS}\n        fence",
            "            pass\n        fence",
        ),
        ("pre", "pre_backward", "wait_group(STAGES - 2)", "wait_group(STAGES - 1)"),
        ("pre", "pre_backward", "fence_async_shared()\n        barrier", "barrier"),
        ("pre", "pre_backward", "number + STAGES - 1", "number + STAGES"),
        ("pre", "pre_backward", "2 if TAIL > 0 else 1)", "2)"),
        ("post_pre", "weight_backward", "wait_group(STAGES - 2)", "wait_group(STAGES - 1)"),
        ("post_pre", "weight_backward", "fence_async_shared()\n        factor", "factor"),
        ("post_pre", "weight_backward", "number + STAGES - 1", "number + STAGES"),
        ("post_pre", "weight_backward", f"else:\n            {OF_HEAD}", "else:\n            pass"),
    ],
)
def test_what_is_not_waited_for_is_seen(
    operation: str,
    name: str,
    right: str,
    wrong: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a kernel that forgets to."""
    sizes = OF_FORWARD if name == "mix_forward" else OF_BACKWARD
    case = Case(operation=operation, dtype=torch.bfloat16, **sizes)
    name, path = f"hopper_{name}", tmp_path / "wrong.py"
    source = Path(hopper_tiles.__file__).with_name(f"{name}.py").read_text()
    assert right in source
    path.write_text(source.replace(right, wrong))
    with (
        hopper_interpreted(monkeypatch, {name: path}),
        pytest.raises((AssertionError, InterpreterError)),
    ):
        compare(case, operands(case, CPU), tiles=tiles_of(case))
