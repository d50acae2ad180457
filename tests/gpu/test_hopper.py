"""Hopper's own kernels against those that they take the place of."""

from dataclasses import replace

import pytest
import torch
from helpers.fused import Case, operands, run_kernels, with_gradients
from torch import Tensor

from mhc_megatron.kernels import Mappings, functional
from mhc_megatron.kernels.triton import hopper
from mhc_megatron.kernels.triton.plan import plan_of
from mhc_megatron.kernels.triton.tiles import Tiles, default_tiles

CUDA = torch.device("cuda")
# No tile divides them, and 16 the tokens.
TOKENS, CHANNELS = 1008, 1288


def tiles_of(case: Case) -> tuple[Tiles, Tiles]:
    """With Hopper's own kernel, and with the one for every GPU."""
    own = default_tiles(case.n, case.tokens, case.channels, case.dtype)
    own = replace(own, hopper_pre_split=256, hopper_weight_split=256)
    assert own.hopper_pre_backward is not None
    return own, replace(own, hopper_pre_backward=None)


def gradients(
    case: Case, leaves: dict, tiles: Tiles, given: dict | None = None, passes: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of all outputs, which come with them; PASSES also of a ``post`` of the same streams."""

    def run(some: dict) -> dict[str, Tensor]:
        outputs = run_kernels(case, some, tiles=tiles)
        if passes:
            mix = Mappings(*(outputs[name] for name in ("pre", "post", "res")))
            own = functional.post(some["streams"], outputs["u"], mix, backend="triton")
            return {"streams": own}
        return outputs

    if given is None:
        given = {name: torch.randn_like(out) for name, out in run(leaves).items()}
    found = with_gradients(run, leaves, given)
    return {name: grad for name, grad in found.items() if name.startswith("d_")}, given


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], times: int = 1) -> None:
    """But for the order of sums, and numbers that are rounded to bfloat16, of which a few in a
    thousand go the other way; or to float16, of which the mappings' gradients of eight streams are
    sums."""
    for name, grad in expected.items():
        bound = 3e-4 if grad.dtype == torch.bfloat16 else 3e-6
        if name.startswith("d_mix"):
            bound = 3e-5
        difference, norm = (found[name].double() - grad.double()).norm(), grad.double().norm()
        assert difference <= times * bound * norm, (name, float(difference / norm))


def compare(case: Case, passes: bool = False) -> None:
    """The same gradients, and the same bits every time."""
    torch.manual_seed(0)
    assert hopper.runs_on(CUDA)
    leaves = operands(case, CUDA)
    tiles, other_tiles = tiles_of(case)
    own, given = gradients(case, leaves, tiles, passes=passes)
    plain, _ = gradients(case, leaves, other_tiles, given, passes)
    assert_close(own, plain)
    # Else one kernel was compared with itself.
    assert not all(torch.equal(own[name], grad) for name, grad in plain.items())
    for _ in range(10):
        again, _ = gradients(case, leaves, tiles, given, passes)
        assert all(torch.equal(again[name], grad) for name, grad in own.items())


@pytest.mark.parametrize("passes", [True, False], ids=["passing", "ending"])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_of_pre(n: int, passes: bool) -> None:
    case = Case(operation="pre", n=n, tokens=TOKENS, channels=CHANNELS, dtype=torch.bfloat16)
    compare(case, passes)


@pytest.mark.parametrize("operation", ["post_pre", "single_pass"])
def test_of_eight_streams(operation: str) -> None:
    case = Case(operation=operation, n=8, tokens=TOKENS, channels=CHANNELS, dtype=torch.bfloat16)
    compare(case)


CASES_OF_A_BOUNDARY = [
    Case(n=1),
    Case(n=2),
    Case(),
    Case(operation="single_pass"),
    Case().with_projection("permutation"),
    Case().with_projection("identity"),
]
NAMES = ["1", "2", "4", "single_pass", "24", "identity"]


@pytest.mark.parametrize("case", CASES_OF_A_BOUNDARY, ids=NAMES)
def test_of_phis_gradient_alone(case: Case) -> None:
    """All others have the same bits."""
    case = replace(case, tokens=TOKENS, channels=CHANNELS, dtype=torch.bfloat16)
    compare(case)
    leaves = operands(case, CUDA)
    tiles, other_tiles = tiles_of(case)
    own, given = gradients(case, leaves, tiles)
    plain, _ = gradients(case, leaves, other_tiles, given)
    changed = [name for name, grad in plain.items() if not torch.equal(own[name], grad)]
    assert changed == ["d_weight"]


@pytest.mark.parametrize("case", CASES_OF_A_BOUNDARY, ids=NAMES)
def test_of_as_many_tokens_in_a_program_phis_gradient_has_the_same_bits(case: Case) -> None:
    case = replace(case, tokens=16, channels=CHANNELS, dtype=torch.bfloat16)
    leaves = operands(case, CUDA)
    assert plan_of(leaves["streams"], leaves["branch"], options=case.options).weight_on_hopper
    tiles, other_tiles = tiles_of(case)
    own, given = gradients(case, leaves, tiles)
    plain, _ = gradients(case, leaves, other_tiles, given)
    for name, grad in plain.items():
        assert torch.equal(own[name], grad), name


@pytest.mark.parametrize("projection", ["permutation", "identity"])
def test_of_other_numbers_of_logits(projection: str) -> None:
    case = Case(operation="pre", tokens=TOKENS, channels=CHANNELS, dtype=torch.bfloat16)
    compare(case.with_projection(projection))


def test_with_a_norm() -> None:
    case = Case(operation="pre", tokens=TOKENS, channels=CHANNELS, dtype=torch.bfloat16, norm=True)
    compare(case)


@pytest.mark.parametrize("n", [4, 8])
def test_of_a_gradient_that_is_not_aligned(n: int) -> None:
    """The kernel for every GPU runs, with the same programs."""
    case = Case(operation="pre", n=n, tokens=TOKENS, channels=CHANNELS, dtype=torch.bfloat16)
    torch.manual_seed(0)
    leaves = operands(case, CUDA)
    tiles, _ = tiles_of(case)
    expected, given = gradients(case, leaves, tiles)
    memory = torch.empty(given["u"].numel() + 1, dtype=torch.bfloat16, device=CUDA)
    given["u"] = memory[1:].view_as(given["u"]).copy_(given["u"])
    found, _ = gradients(case, leaves, tiles, given)
    assert_close(found, expected)
    assert not all(torch.equal(found[name], grad) for name, grad in expected.items())


@pytest.mark.parametrize("operation", ["pre", "post_pre"])
def test_of_more_numbers_than_32_bits_count(operation: str) -> None:
    """The last tokens of which begin behind 2^31 numbers of the streams. Of a boundary's phi the
    gradient is a sum of as many tokens in either kernel."""
    n, channels, last = 4, 2560, 64
    tokens = 2**31 // (n * channels) // 16 * 16 + last
    case = Case(operation=operation, n=n, tokens=tokens, channels=channels, dtype=torch.bfloat16)
    torch.manual_seed(0)
    leaves = operands(replace(case, tokens=1), CUDA)
    of_each = [name for name in leaves if name in ("streams", "branch") or name.startswith("mix_")]
    for name in of_each:
        width, dtype = leaves[name].shape[1:], leaves[name].dtype
        leaves[name] = torch.randn(tokens, *width, dtype=dtype, device=CUDA)
    tiles, other_tiles = tiles_of(case)
    tiles = replace(tiles, hopper_pre_split=1024, hopper_weight_split=2048)
    own, given = gradients(case, leaves, tiles)
    plain, _ = gradients(case, leaves, replace(other_tiles, pre_split=1024), given)
    for name in of_each:
        own[f"d_{name}"], plain[f"d_{name}"] = own[f"d_{name}"][-last:], plain[f"d_{name}"][-last:]
    assert_close(own, plain)
    assert torch.equal(own["d_weight"], plain["d_weight"]) == (operation == "post_pre")


@pytest.mark.parametrize("tokens", [TOKENS, 1, 8200])
@pytest.mark.parametrize(
    "case",
    [
        Case(operation="pre"),
        Case(operation="post_pre"),
        Case(operation="post_pre", branch_bias=True),
        Case(operation="single_pass"),
        Case(operation="post_pre", norm=True),
        Case(operation="post_pre").with_projection("permutation"),
    ],
    ids=["pre", "post_pre", "bias", "single_pass", "norm", "permutation"],
)
def test_of_the_forward(case: Case, tokens: int) -> None:
    """The new streams have the bits of ``mix_fwd``, and all results the same ones every time."""
    case = replace(case, tokens=tokens, channels=CHANNELS, dtype=torch.bfloat16)
    torch.manual_seed(0)
    leaves = operands(case, CUDA)
    tiles = default_tiles(case.n, tokens, CHANNELS, case.dtype)
    assert tiles.hopper_mix is not None
    # Two programs of the same tokens: one adds up in the order of mix_fwd, and has its bits.
    tiles = replace(tiles, hopper_mix=replace(tiles.hopper_mix, span=704))
    own = run_kernels(case, leaves, tiles=tiles)
    plain = run_kernels(case, leaves, tiles=replace(tiles, hopper_mix=None))
    if "streams" in own:
        assert torch.equal(own["streams"], plain["streams"])
    # Of a single token nothing averages out.
    assert_close(own, plain, times=4 if tokens == 1 else 1)
    assert not all(torch.equal(own[name], result) for name, result in plain.items())
    for _ in range(10):
        again = run_kernels(case, leaves, tiles=tiles)
        assert all(torch.equal(again[name], result) for name, result in own.items())


def test_the_forward_of_streams_that_are_not_aligned() -> None:
    case = Case(operation="post_pre", tokens=TOKENS, channels=CHANNELS, dtype=torch.bfloat16)
    leaves = operands(case, CUDA)
    expected = run_kernels(case, leaves)
    for name in ("streams", "branch"):
        memory = torch.empty(leaves[name].numel() + 1, dtype=torch.bfloat16, device=CUDA)
        leaves[name] = memory[1:].view_as(leaves[name]).copy_(leaves[name])
    found = run_kernels(case, leaves)
    assert all(torch.equal(found[name], result) for name, result in expected.items())
