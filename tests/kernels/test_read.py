"""``read_fwd`` of sums as ``hopper_mix_fwd`` leaves them, which needs a GPU; by the interpreter."""

import pytest
import torch

from mhc_megatron.kernels import MappingOptions
from mhc_megatron.kernels.triton import bound, launch
from mhc_megatron.kernels.triton.arguments import Parameters
from mhc_megatron.kernels.triton.plan import plan_of
from mhc_megatron.kernels.triton.tiles import Tile

OPTIONS = MappingOptions(iterations=3, eps=1e-3, rms_eps=1e-2)
N, M, TOKENS, CHANNELS, SPAN, TILE = 4, 24, 37, 72, 40, 16


def sums_of(streams: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[programs, 2 M + 1, TILE]: of every tile's tokens, and the channels up to SPAN and beyond."""
    padded = torch.zeros(-(-TOKENS // TILE) * TILE, N, CHANNELS)
    padded[:TOKENS] = streams.float()
    high = weight.bfloat16()
    parts = torch.cat([high, (weight - high.float()).bfloat16()]).float().view(2 * M, N, CHANNELS)
    programs = []
    for tile in padded.split(TILE):
        for x, phi in zip(tile.split(SPAN, -1), parts.split(SPAN, -1), strict=True):
            products = torch.einsum("tnc,mnc->mt", x, phi)
            programs.append(torch.cat([products, x.square().sum((1, 2))[None]]))
    return torch.stack(programs)


@pytest.mark.parametrize("reads", [True, False])
def test_it_adds_up_products_and_squares(reads: bool) -> None:
    torch.manual_seed(0)
    streams = torch.randn(TOKENS, N, CHANNELS).bfloat16()
    weight = torch.randn(M, N * CHANNELS) / (N * CHANNELS) ** 0.5
    parameters = Parameters(weight, *torch.randn(3).split(1), torch.randn(M))
    plan = plan_of(streams, options=OPTIONS)
    factors, _ = launch.factor_weight(plan, None, weight)
    alone = (None, streams, None, None, None, factors, parameters, None)
    _, u, raw, packed, _ = launch.mix(plan, *alone)
    tile = Tile(tokens=4, channels=16, num_warps=1)
    sizes = N, CHANNELS, M, torch.bfloat16, OPTIONS, tile, 2, TILE
    kernel = bound.read_fwd(*sizes, reads, False, True)
    found = torch.empty_like(u), torch.empty_like(raw), torch.empty_like(packed)
    later = bound.later_tokens(N, tile)
    programs = -(-TOKENS // later) + (-(-TOKENS // tile.tokens) if reads else 0)
    numbers = TOKENS, OPTIONS.rms_eps, OPTIONS.eps, 0.0
    _, *mappings = parameters
    operands = streams, sums_of(streams, weight), *mappings, None, *found, None, None
    kernel((programs,), operands, numbers)
    # The interpreter rounds phi's parts otherwise than torch does, in their 16th bit.
    for name, new, old in zip(("u", "raw", "packed"), found, (u, raw, packed), strict=True):
        if name != "u":
            torch.testing.assert_close(new, old, rtol=0, atol=1e-4, msg=name)
        elif reads:
            assert (new.float() - old.float()).norm() < 1e-3 * old.float().norm()
