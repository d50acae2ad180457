"""The table of tiles, and what it depends on."""

from dataclasses import replace

import pytest
import torch

from mhc_megatron.kernels import MappingOptions
from mhc_megatron.kernels.triton import hopper_bound
from mhc_megatron.kernels.triton.plan import plan_of
from mhc_megatron.kernels.triton.tiles import (
    HOPPER_MIX_TILE,
    HOPPER_PRE_TILE,
    HOPPER_WEIGHT_TILE,
    Tile,
    blocks,
    default_tiles,
)


@pytest.mark.parametrize(
    ("tokens", "channels", "of_a_program"),
    [
        (0, 2560, 1024),
        (2048, 2560, 1024),
        (2049, 2560, 2048),
        (4096, 1280, 1024),
        (4096, 2048, 1024),
        (4096, 2112, 2048),
        (8192, 1280, 2048),
    ],
)
def test_programs_of_weight_bwd_are_two_for_every_multiprocessor(
    tokens: int, channels: int, of_a_program: int
) -> None:
    assert default_tiles(4, tokens, channels, torch.bfloat16).weight_split == of_a_program


@pytest.mark.parametrize(
    ("tokens", "channels", "of_a_program", "programs"),
    [
        (0, 2560, 512, 0),
        (17, 72, 512, 8),
        (4096, 1280, 704, 480),
        (4096, 2560, 1376, 480),
        (8192, 1920, 2048, 480),
        (8192, 4096, 4096, 512),
        (4096, 7168, 2048, 896),
        (4096, 16384, 2048, 2048),
    ],
)
def test_programs_of_pre_bwd_are_at_most_four_for_every_multiprocessor(
    tokens: int, channels: int, of_a_program: int, programs: int
) -> None:
    """But where two programs of the same channels make more."""
    tiles = default_tiles(4, tokens, channels, torch.bfloat16)
    assert tiles.pre_split == of_a_program
    assert of_a_program % tiles.pre_backward.tokens == 0
    streams = torch.empty(tokens, 4, channels, dtype=torch.bfloat16, device="meta")
    splits = plan_of(streams, options=MappingOptions()).splits
    assert 4 * blocks(channels, tiles.pre_backward.channels) * splits == programs


@pytest.mark.parametrize(
    ("n", "tokens", "channels", "of_a_program"),
    [
        (4, 17, 72, 512),
        (4, 4096, 1280, 1024),
        (4, 4096, 2560, 2048),
        (4, 8192, 1920, 512),
        (4, 4096, 7168, 1024),
        (2, 4096, 2560, 1024),
        (8, 4096, 2560, 1024),
    ],
)
def test_programs_of_hopper_pre_bwd_leave_little_room_in_their_last_round(
    n: int, tokens: int, channels: int, of_a_program: int
) -> None:
    """As measured where it was: of three splits the fastest."""
    assert default_tiles(n, tokens, channels, torch.bfloat16).hopper_pre_split == of_a_program


@pytest.mark.parametrize(
    ("tokens", "channels", "span"),
    [
        (0, 64, 64),
        (1, 1288, 192),
        (1024, 1280, 320),
        (2048, 2560, 1280),
        # 128 programs, and 256 are two rounds of nearly as many.
        (4096, 2560, 2560),
        (8192, 1920, 1920),
        # 157 programs are two rounds, and 628 five.
        (5000, 2560, 640),
    ],
)
def test_programs_of_hopper_mix_fwd_leave_little_room_in_their_last_round(
    tokens: int, channels: int, span: int
) -> None:
    tile = default_tiles(4, tokens, channels, torch.bfloat16).hopper_mix
    assert tile == replace(HOPPER_MIX_TILE, span=span)


@pytest.mark.parametrize(
    ("n", "tokens", "channels", "of_a_program", "programs"),
    [
        (4, 0, 8, 64, 0),
        (2, 4096, 2560, 704, 120),
        (4, 4096, 1280, 704, 120),
        (4, 4096, 2560, 1408, 120),
        (4, 8192, 4096, 4096, 128),
        (4, 4096, 7168, 4096, 112),
    ],
)
def test_programs_of_hopper_weight_bwd_likewise(
    n: int, tokens: int, channels: int, of_a_program: int, programs: int
) -> None:
    tiles = default_tiles(n, tokens, channels, torch.bfloat16)
    assert tiles.hopper_weight is not None
    assert tiles.hopper_weight_split == of_a_program
    columns = blocks(n * channels, tiles.hopper_weight.channels)
    assert columns * blocks(tokens, of_a_program) == programs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_nothing_else_depends_on_tokens_and_channels(n: int, dtype: torch.dtype) -> None:
    few, many = default_tiles(n, 1024, 1280, dtype), default_tiles(n, 8192, 4096, dtype)
    assert (few == many) == (dtype != torch.bfloat16)
    depends = ["hopper_pre_split"]
    if n <= 4:
        depends += ["hopper_weight_split"]
    if n == 4:
        depends += ["weight_split", "pre_split", "pre", "hopper_mix", "post_backward"]
    changed = {name: getattr(many, name) for name in depends}
    assert replace(few, **changed) == many


@pytest.mark.parametrize(("tokens", "of_a_program"), [(4224, 32), (4225, 64), (8192, 64)])
def test_programs_of_pre_have_more_tokens_where_there_would_be_two_rounds(
    tokens: int, of_a_program: int
) -> None:
    tiles = default_tiles(4, tokens, 64, torch.bfloat16)
    assert (tiles.pre or tiles.mix).tokens == of_a_program
    assert (tiles.pre or tiles.mix).channels == tiles.mix.channels


def test_programs_that_square_all_streams_cannot_share_a_tokens_channels() -> None:
    streams = torch.empty(5, 8, 64, dtype=torch.bfloat16, device="meta")
    tile = Tile(tokens=4, channels=16, span=32)
    tiles = replace(default_tiles(8, 5, 64, torch.bfloat16), post=tile)
    assert plan_of(streams, streams[:, 0], tiles=tiles).post_fwd
    plan = plan_of(streams, streams[:, 0], options=MappingOptions(), tiles=tiles)
    with pytest.raises(ValueError, match=r"tiles\.post\.span: expected None.* got 32"):
        plan.post_fwd  # noqa: B018
    plan = plan_of(streams, options=MappingOptions(), tiles=tiles)
    with pytest.raises(ValueError, match=r"tiles\.post\.span: expected None.* got 32"):
        plan.square_fwd  # noqa: B018


@pytest.mark.parametrize(
    "wrong", [{"tokens": 32}, {"channels": 32}, {"num_warps": 2}, {"num_stages": 1}], ids=str
)
def test_a_tile_of_hopper_pre_bwd_that_it_cannot_have_is_refused(wrong: dict[str, int]) -> None:
    tile = replace(HOPPER_PRE_TILE, **wrong)
    how = dict(has_grad_y=True, trains=True, scaled=False, single_pass=False)
    with pytest.raises(ValueError, match=r"hopper_pre_backward: expected 64 or 128 .* got Tile"):
        hopper_bound.hopper_pre_bwd(4, 64, 24, tile, 512, 3, **how)


@pytest.mark.parametrize(
    "wrong",
    [{"tokens": 16}, {"channels": 32}, {"num_warps": 2}, {"num_stages": 1}, {"span": 96}],
    ids=str,
)
def test_a_tile_of_hopper_mix_fwd_that_it_cannot_have_is_refused(wrong: dict[str, int]) -> None:
    tile = replace(HOPPER_MIX_TILE, **wrong)
    with pytest.raises(ValueError, match=r"hopper_mix: expected 32 or 64 tokens, .* got Tile"):
        hopper_bound.hopper_mix_fwd(4, 128, 24, tile, True, False, False)


@pytest.mark.parametrize(
    "wrong", [{"tokens": 32}, {"channels": 512}, {"num_warps": 2}, {"num_stages": 1}], ids=str
)
def test_a_tile_of_hopper_weight_bwd_that_it_cannot_have_is_refused(wrong: dict[str, int]) -> None:
    tile = replace(HOPPER_WEIGHT_TILE, **wrong)
    with pytest.raises(ValueError, match=r"hopper_weight: expected 64 or 128 tokens, .* got Tile"):
        hopper_bound.hopper_weight_bwd(512, 24, tile, 512)


def test_a_tile_of_mix_fwd_with_too_few_channels_is_refused() -> None:
    streams = torch.empty(5, 4, 16, dtype=torch.bfloat16, device="meta")
    tiles = default_tiles(4, 5, 16, torch.bfloat16)
    narrow = replace(tiles, mix=Tile(tokens=16, channels=4))
    assert plan_of(streams, options=MappingOptions(), tiles=tiles).chunk_width == 64
    with pytest.raises(ValueError, match=r"tiles\.mix\.channels: expected at least 8 .* got 4"):
        plan_of(streams, options=MappingOptions(), tiles=narrow).chunk_width  # noqa: B018


def test_a_tile_of_pre_that_its_streams_cannot_have_is_refused() -> None:
    tile = Tile(tokens=64, channels=32)
    streams = torch.empty(5, 4, 16, dtype=torch.bfloat16, device="meta")
    tiles = replace(default_tiles(4, 5, 16, torch.bfloat16), pre=tile)
    with pytest.raises(ValueError, match=r"tiles\.pre\.channels: expected 64.* got 32"):
        plan_of(streams, options=MappingOptions(), tiles=tiles).mix_fwd  # noqa: B018
    assert plan_of(streams, streams[:, 0], options=MappingOptions(), tiles=tiles).mix_fwd
    streams = torch.empty(5, 8, 16, dtype=torch.bfloat16, device="meta")
    tiles = replace(default_tiles(8, 5, 16, torch.bfloat16), pre=tile)
    with pytest.raises(ValueError, match=r"tiles\.pre: expected None, as of 8 streams"):
        plan_of(streams, options=MappingOptions(), tiles=tiles).square_fwd  # noqa: B018
