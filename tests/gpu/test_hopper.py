"""Hopper's own kernels against those that they take the place of."""

from dataclasses import replace

import pytest
import torch
from helpers.fused import Case, operands, run_kernels, with_gradients
from torch import Tensor

from mhc_megatron.kernels.triton import hopper
from mhc_megatron.kernels.triton.tiles import Tiles, default_tiles

CUDA = torch.device("cuda")
# No tile divides them, and 16 the tokens.
TOKENS, CHANNELS = 1008, 1288


def tiles_of(case: Case) -> tuple[Tiles, Tiles]:
    """With Hopper's own kernel, and with the one for every GPU."""
    own = default_tiles(case.n, case.tokens, case.channels, case.dtype)
    own = replace(own, hopper_pre_split=256)
    assert own.hopper_pre_backward is not None
    return own, replace(own, hopper_pre_backward=None)


def gradients(case: Case, leaves: dict, given: dict, tiles: Tiles) -> dict[str, Tensor]:
    found = with_gradients(lambda some: run_kernels(case, some, tiles=tiles), leaves, given)
    return {name: grad for name, grad in found.items() if name.startswith("d_")}


def compare(case: Case, *results: str) -> None:
    """The same gradients but for the order of sums, and the same bits every time."""
    torch.manual_seed(0)
    assert hopper.runs_on(CUDA)
    leaves = operands(case, CUDA)
    given = {name: torch.randn_like(out) for name, out in run_kernels(case, leaves).items()}
    given = {name: given[name] for name in results}
    own, plain = (gradients(case, leaves, given, tiles) for tiles in tiles_of(case))
    differs = False
    for name, expected in plain.items():
        difference = (own[name].double() - expected.double()).norm() / expected.double().norm()
        # Of numbers that are rounded to bfloat16 a few in a thousand go the other way; of float32
        # it is the order of sums.
        bound = 3e-4 if own[name].dtype == torch.bfloat16 else 3e-6
        assert difference <= bound, name
        differs |= bool(difference)
    # Else one kernel was compared with itself.
    assert differs
    for _ in range(10):
        again = gradients(case, leaves, given, tiles_of(case)[0])
        assert all(torch.equal(again[name], grad) for name, grad in own.items())


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("passes", [True, False], ids=["passing", "ending"])
def test_of_pre(n: int, passes: bool) -> None:
    case = Case(operation="pre", n=n, tokens=TOKENS, channels=CHANNELS, dtype=torch.bfloat16)
    compare(case, "u", "pre", "post", "res", *(["streams"] if passes else []))


@pytest.mark.parametrize("operation", ["post_pre", "single_pass"])
def test_of_eight_streams(operation: str) -> None:
    case = Case(operation=operation, n=8, tokens=TOKENS, channels=CHANNELS, dtype=torch.bfloat16)
    compare(case, "streams", "u", "pre", "post", "res")


@pytest.mark.parametrize("projection", ["permutation", "identity"])
def test_of_other_numbers_of_logits(projection: str) -> None:
    case = Case(operation="pre", tokens=TOKENS, channels=CHANNELS, dtype=torch.bfloat16)
    compare(case.with_projection(projection), "u", "pre", "post", "res")


def test_with_a_norm() -> None:
    case = Case(operation="pre", tokens=TOKENS, channels=CHANNELS, dtype=torch.bfloat16, norm=True)
    compare(case, "u", "pre", "post", "res")


@pytest.mark.parametrize("n", [4, 8])
def test_of_a_gradient_that_is_not_aligned(n: int) -> None:
    """The kernel for every GPU runs, with the same programs."""
    case = Case(operation="pre", n=n, tokens=TOKENS, channels=CHANNELS, dtype=torch.bfloat16)
    torch.manual_seed(0)
    leaves = operands(case, CUDA)
    own, _ = tiles_of(case)
    outputs = run_kernels(case, leaves)
    given = {name: torch.randn_like(out) for name, out in outputs.items()}
    expected = gradients(case, leaves, given, own)
    memory = torch.empty(given["u"].numel() + 1, dtype=torch.bfloat16, device=CUDA)
    given["u"] = memory[1:].view_as(given["u"]).copy_(given["u"])
    found = gradients(case, leaves, given, own)
    for name, grad in expected.items():
        difference = (found[name].double() - grad.double()).norm() / grad.double().norm()
        assert difference <= (3e-4 if grad.dtype == torch.bfloat16 else 3e-6), name
