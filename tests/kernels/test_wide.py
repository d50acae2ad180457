"""Many streams, whose kernels take a token's channels apart: splits, tails, and cuts of a model."""

from dataclasses import replace

import pytest
import torch
from helpers.fused import (
    OPERATIONS,
    Case,
    compare,
    operands,
    random_gradients,
    run_kernels,
    run_reference,
    with_gradients,
)

from mhc_megatron.kernels.triton.arguments import logit_groups
from mhc_megatron.kernels.triton.tiles import Tile, Tiles, default_tiles


def small_tiles(case: Case, span: int) -> Tiles:
    """Programs of few tokens, and of ``span`` channels where they share a token's."""
    tile = Tile(tokens=16, channels=16, num_stages=1, span=span)
    tiles = default_tiles(case.n, case.tokens, case.channels, case.dtype)
    return replace(tiles, project=tile)


@pytest.mark.parametrize(
    ("operation", "dtype"),
    [*((operation, torch.bfloat16) for operation in OPERATIONS), ("post_pre", torch.float32)],
)
def test_programs_that_share_a_tokens_channels(
    operation: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of 32, 32 and 8 channels, and the last of the tokens alone in its tile.

    What no program writes is not a number.
    """

    def poisoned(allocate: object) -> object:
        return lambda *args, **kwargs: allocate(*args, **kwargs).fill_(float("nan"))

    bias = operation in ("post", "post_pre")
    case = Case(operation=operation, n=8, tokens=17, channels=72, dtype=dtype, branch_bias=bias)
    leaves = operands(case, device)
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    compare(case, leaves, tiles=small_tiles(case, 32))


@pytest.mark.parametrize("operation", ["pre", "post_pre", "single_pass"])
def test_programs_that_share_phis_gradient(operation: str, device: torch.device) -> None:
    """64 tokens and 2, and 8 channels in the last of a stream."""
    case = Case(operation=operation, n=8, tokens=66, channels=72, dtype=torch.bfloat16)
    tile = Tile(tokens=64, channels=64, num_stages=2)
    tiles = default_tiles(case.n, case.tokens, case.channels, case.dtype)
    tiles = replace(tiles, pre_backward=tile, pre_split=64)
    compare(case, operands(case, device), tiles=tiles)


def test_no_more_programs_walk_through_iterations_than_read_streams(device: torch.device) -> None:
    """Sums of both have as many columns as there are programs of the latter."""
    case = Case(n=8, tokens=130, channels=24, dtype=torch.bfloat16)
    many = Tile(tokens=64, channels=16, num_stages=1)
    tiles = replace(
        default_tiles(case.n, case.tokens, case.channels, case.dtype), mix_backward=many
    )
    compare(case, operands(case, device), tiles=tiles)


def test_scaled_gradients_have_scaled_gradients(device: torch.device) -> None:
    """By a power of two to the bit: what one kernel leaves to the next has 16 bits and a scale."""
    case = Case(n=8, tokens=5, channels=72, dtype=torch.bfloat16)
    leaves = operands(case, device)
    gradients = random_gradients(run_reference(case, leaves))
    tiles = replace(
        default_tiles(case.n, case.tokens, case.channels, case.dtype),
        pre_backward=Tile(tokens=16, channels=16, num_stages=1),
        post_backward=Tile(tokens=4, channels=64, num_stages=1),
    )
    found = with_gradients(lambda x: run_kernels(case, x, tiles=tiles), leaves, gradients)
    for factor in (2.0**-40, 2.0**20):
        scaled = {name: gradient * factor for name, gradient in gradients.items()}
        expected = with_gradients(lambda x: run_kernels(case, x, tiles=tiles), leaves, scaled)
        for name, gradient in found.items():
            if name.startswith("d_"):
                # The mappings of the sublayer that ends do not read.
                assert gradient.any() == (name != "d_mix_pre"), name
                assert torch.equal(gradient * factor, expected[name]), name


def test_tokens_without_a_gradient_have_none(device: torch.device) -> None:
    """And do not divide by nothing."""
    case = Case(n=8, tokens=3, channels=24, dtype=torch.bfloat16)
    leaves = operands(case, device)
    gradients = {
        name: torch.zeros_like(gradient)
        for name, gradient in random_gradients(run_reference(case, leaves)).items()
    }
    found = with_gradients(lambda x: run_kernels(case, x), leaves, gradients)
    for name, gradient in found.items():
        assert not name.startswith("d_") or not gradient.any(), name


def test_what_is_not_finite_stays_so(device: torch.device) -> None:
    """What overflowed shows in all gradients that it is in, as if all bits were kept."""
    case = Case(n=8, tokens=3, channels=24, dtype=torch.bfloat16)
    leaves = operands(case, device)
    for bad in (float("nan"), float("inf"), -float("inf")):
        gradients = random_gradients(run_reference(case, leaves))
        gradients["streams"][1, 2, 5] = bad
        found = with_gradients(lambda x: run_kernels(case, x), leaves, gradients)
        for name in ("d_streams", "d_branch", "d_mix_post", "d_mix_res"):
            finite = found[name].isfinite().flatten(1).all(1)
            assert finite.tolist() == [True, False, True], name


@pytest.mark.parametrize("n", [4, 8], ids="n{}".format)
def test_a_model_cut_between_two_layers_has_the_bits_of_the_whole(
    n: int, device: torch.device
) -> None:
    """``pre`` of the streams that ``post_pre`` wrote reads what it read."""
    case = Case(n=n, tokens=17, channels=72, dtype=torch.bfloat16)
    leaves = operands(case, device)
    tiles = small_tiles(case, 32) if n == 8 else None
    whole = run_kernels(case, leaves, tiles=tiles)
    cut = run_kernels(
        replace(case, operation="pre"), {**leaves, "streams": whole["streams"]}, tiles=tiles
    )
    for name, expected in cut.items():
        assert torch.equal(whole[name], expected), name


def test_a_tokens_numbers_do_not_depend_on_the_other_tokens(device: torch.device) -> None:
    """Nor on how many they are: those before it change places, those after it are left out.

    It keeps its own place in a tile: Triton's interpreter multiplies as numpy does, and on some
    CPUs the bits of a product depend on where its numbers stand.
    """
    at, case = 32, Case(n=8, tokens=40, channels=24, dtype=torch.bfloat16)
    leaves = operands(case, device)
    gradients = random_gradients(run_reference(case, leaves))
    all_tokens = with_gradients(lambda x: run_kernels(case, x), leaves, gradients)
    per_token = ("streams", "branch", "mix_pre", "mix_post", "mix_res")

    def others(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor[:at].flip(0), tensor[at : at + 1]])

    fewer = with_gradients(
        lambda x: run_kernels(replace(case, tokens=at + 1), x),
        {k: others(v) if k in per_token and v is not None else v for k, v in leaves.items()},
        {name: others(gradient) for name, gradient in gradients.items()},
    )
    for name in ("streams", "u", "pre", "post", "res", *(f"d_{name}" for name in per_token)):
        assert torch.equal(all_tokens[name][at], fewer[name][at]), name
    assert not torch.equal(all_tokens["u"][0], fewer["u"][0])


@pytest.mark.parametrize(
    ("num_logits", "groups"), [(80, (64, 16)), (16, (16, 0)), (24, (32, 0)), (8, (16, 0))]
)
def test_rows_of_phi_fill_products_of_powers_of_two(
    num_logits: int, groups: tuple[int, int]
) -> None:
    assert logit_groups(num_logits) == groups
