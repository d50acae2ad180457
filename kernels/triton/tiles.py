"""Tile sizes: one table by number of streams and dtype, which callers can override.

The choices decide speed, and through the order of sums the last bits, but no other property.
"""

from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One kernel's tile: BT tokens by BC channels (powers of two), warps, and pipeline stages.

    Attributes:
        span: channels of a program, a multiple of the tile's; None for all. Only of ``post``, and
            of ``project``, where those of all streams are counted.
    """

    tokens: int
    channels: int
    num_warps: int = 4
    num_stages: int = 3
    span: int | None = None

    def splits(self, channels: int) -> int:
        """How many programs share so many of a token."""
        return 1 if self.span is None else blocks(channels, self.span)


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """The tiles of one hyper-connection's kernels.

    Attributes:
        mix: ``mix_fwd``, post and the next pre in one pass; tokens at least 16, channels 8. Of more
            than four streams ``read_fwd``, what follows ``project_fwd``.
        pre: ``mix_fwd`` of ``pre`` alone, of up to four streams; of as many channels as ``mix``, so
            that both have the same bits. None for ``mix``.
        project: ``project_fwd``, of more than four streams, with a ``span``; tokens at least 16.
        post: ``post_fwd``, post alone; of more than four streams also in ``post_pre``, and there
            without a span, and ``square_fwd``.
        rebuild: ``rebuild_fwd``, the states of a block without its branches.
        mix_backward: ``mix_bwd``, the gradients of the coefficients.
        mix_backward_norm: ``mix_bwd`` with the gradient of a norm, which has 2 n + 1 sums per token
            and not n; None for ``mix_backward``.
        streams_backward: ``streams_bwd`` of ``post_pre``, the gradients of streams and branch;
            tokens at least 16. None of more than four streams.
        post_backward: ``streams_bwd`` of ``post`` alone, which multiplies no matrices. Of more than
            four streams ``wide_streams_bwd``, of ``post_pre`` too.
        pre_backward: ``pre_bwd``, the gradients of the streams and phi; tokens at least 16. Of more
            than four streams ``wide_pre_bwd``, of ``post_pre`` too.
        pre_split: tokens per program of that, a multiple of its tile's; each split costs
            M * n * C float32 numbers written and read.
        hopper_mix: ``hopper_mix_fwd``, which is launched with ``read_fwd`` in the place of
            ``mix_fwd`` where ``Buffers.mixes_on_hopper``, with a ``span``; 32 or 64 tokens, 64
            channels. None for nowhere.
        hopper_read: ``read_fwd`` behind it.
        hopper_pre_backward: ``hopper_pre_bwd``, which is launched in the place of ``pre_bwd`` and
            ``wide_pre_bwd`` where ``Buffers.on_hopper``; 64 or 128 tokens and channels. None for
            nowhere.
        hopper_pre_split: tokens per program of that.
        hopper_weight: ``hopper_weight_bwd``, which is launched in the place of ``weight_bwd`` where
            ``Buffers.weight_on_hopper``; ``channels`` counts columns of phi. None for nowhere.
        hopper_weight_split: tokens per program of that.
        weight_backward: ``weight_bwd``, the gradient of phi; ``channels`` counts columns of phi.
            None of more than four streams.
        weight_split: tokens per program of ``weight_bwd``, a multiple of its tile's; 2048
            make 320 programs of 4096 tokens and 4 x 2560 channels.
        product_terms: of bfloat16 streams, products of the two parts in ``grad_projected @ phi``:
            high by high (1), low by high (2), high by low (3). Two leave phi rounded to 8 bits,
            an error of up to 5e-4 in the gradients of the mappings that wrote the streams.
    """

    mix: Tile
    post: Tile
    rebuild: Tile
    mix_backward: Tile
    post_backward: Tile
    pre_backward: Tile
    streams_backward: Tile | None = None
    weight_backward: Tile | None = None
    mix_backward_norm: Tile | None = None
    pre: Tile | None = None
    hopper_mix: Tile | None = None
    hopper_read: Tile | None = None
    hopper_pre_backward: Tile | None = None
    hopper_weight: Tile | None = None
    project: Tile | None = None
    pre_split: int = 1024
    hopper_pre_split: int = 1024
    hopper_weight_split: int = 1024
    weight_split: int = 1024
    product_terms: int = 3


# Of an H100 or H200.
MULTIPROCESSORS = 132
# Of ``hopper_pre_bwd``: its tile, and how many of its programs a multiprocessor has room for.
HOPPER_PRE_TILE = Tile(tokens=64, channels=64, num_stages=2)
HOPPER_PROGRAMS, HOPPER_WIDE_PROGRAMS = 3, 2
HOPPER_SPLITS = 512, 1024, 2048
# Of ``hopper_mix_fwd``, of which a multiprocessor has room for one program: its tile, and how many
# programs of the same tokens are tried.
HOPPER_MIX_TILE = Tile(tokens=32, channels=64, num_stages=4)
HOPPER_MIX_SPLITS = 8
# Of ``hopper_weight_bwd``, likewise, and into how many parts the tokens may be cut.
HOPPER_WEIGHT_TILE = Tile(tokens=64, channels=256, num_warps=8, num_stages=4)
HOPPER_WEIGHT_SPLITS = 8
# Below which programs of one warp are faster in the backward of ``post`` of four streams.
FEW_CHANNELS = 2048
# Tokens per program of ``pre_bwd``, where few channels would leave fewer.
LEAST_PRE_SPLIT = 512


def blocks(size: int, block: int) -> int:
    """How many blocks cover ``size``; triton.cdiv costs ten times as long, at every launch."""
    return -(-size // block)


# As many as there may be numbers of tokens.
@lru_cache(maxsize=1024)
def default_tiles(num_streams: int, num_tokens: int, channels: int, dtype: torch.dtype) -> Tiles:
    """The table.

    Args:
        num_streams, channels: n, C.
        num_tokens: T.
        dtype: the streams'.
    """
    tiles = _tiles(num_streams, dtype)
    if num_streams == 4 and dtype == torch.bfloat16:
        assert tiles.weight_backward is not None
        width = num_streams * channels
        # Where a multiprocessor would have fewer than two programs, each has half the tokens.
        programs = blocks(width, tiles.weight_backward.channels)
        if programs * blocks(num_tokens, tiles.weight_split) < 2 * MULTIPROCESSORS:
            tiles = replace(tiles, weight_split=tiles.weight_split // 2)
        if channels < FEW_CHANNELS:
            tile = Tile(tokens=2, channels=128, num_warps=1, num_stages=1)
            tiles = replace(tiles, post_backward=tile)
        # A program of ``mix_fwd`` fills a multiprocessor, and reads phi once for all of its tokens.
        if blocks(num_tokens, tiles.mix.tokens) > MULTIPROCESSORS:
            tiles = replace(tiles, pre=Tile(tokens=64, channels=64, num_warps=8))
        # As many programs as there is room for at once, four on a multiprocessor: a few more would
        # be another round, and fewer tokens in each would be more sums to add up. But no less than
        # two of the same channels: half the tokens in two rounds are faster than all in one.
        tile = tiles.pre_backward
        programs = num_streams * blocks(channels, tile.channels)
        tokens = blocks(num_tokens, max(2, 4 * MULTIPROCESSORS // programs))
        tokens = max(LEAST_PRE_SPLIT, blocks(tokens, tile.tokens) * tile.tokens)
        tiles = replace(tiles, pre_split=tokens)
    if tiles.hopper_mix is not None:
        span = _hopper_mix_span(num_tokens, channels, tiles.hopper_mix)
        tiles = replace(tiles, hopper_mix=replace(tiles.hopper_mix, span=span))
    if tiles.hopper_weight is not None:
        split = _hopper_weight_split(num_streams * channels, num_tokens, tiles.hopper_weight)
        tiles = replace(tiles, hopper_weight_split=split)
    if tiles.hopper_pre_backward is not None:
        split = _hopper_pre_split(num_streams, num_tokens, channels, tiles.hopper_pre_backward)
        tiles = replace(tiles, hopper_pre_split=split)
    return tiles


def _hopper_mix_span(num_tokens: int, channels: int, tile: Tile) -> int:
    """The span that takes the shortest time, counted in tiles of channels: rounds of programs, each
    of which needs as long as its stages before it has its first. The largest of several."""
    programs, width = blocks(num_tokens, tile.tokens), blocks(channels, tile.channels)
    spans = [blocks(width, splits) for splits in range(1, min(width, HOPPER_MIX_SPLITS) + 1)]

    def duration(span: int) -> int:
        rounds = blocks(programs * blocks(width, span), MULTIPROCESSORS)
        return rounds * (span + tile.num_stages)

    return min(spans, key=duration) * tile.channels


def _hopper_pre_split(num_streams: int, num_tokens: int, channels: int, tile: Tile) -> int:
    """The split that takes the shortest time, counted in tokens: rounds of programs, each of which
    needs as long as a tile before it has its first. The largest of several."""
    room = MULTIPROCESSORS * (HOPPER_PROGRAMS if num_streams <= 4 else HOPPER_WIDE_PROGRAMS)
    columns = num_streams * blocks(channels, tile.channels)

    def cost(split: int) -> tuple[int, int]:
        rounds = blocks(columns * blocks(num_tokens, split), room)
        return rounds * (split + tile.tokens), -split

    return min(HOPPER_SPLITS, key=cost)


def _hopper_weight_split(width: int, num_tokens: int, tile: Tile) -> int:
    """Likewise, of ``hopper_weight_bwd``, counted in tiles of tokens; every part is a sum to be
    written and read."""
    columns, steps = blocks(width, tile.channels), max(1, blocks(num_tokens, tile.tokens))

    def cost(split: int) -> int:
        parts = blocks(steps, split)
        return blocks(columns * parts, MULTIPROCESSORS) * (split + tile.num_stages) + parts

    splits = {blocks(steps, parts) for parts in range(1, HOPPER_WEIGHT_SPLITS + 1)}
    return min(sorted(splits, reverse=True), key=cost) * tile.tokens


@cache
def _tiles(num_streams: int, dtype: torch.dtype) -> Tiles:
    if num_streams > 4:
        return _wide_tiles(dtype)
    if dtype != torch.bfloat16:
        # float32 products of the parts need more registers and shared memory.
        return Tiles(
            mix=Tile(tokens=16, channels=32),
            post=Tile(tokens=16, channels=64, num_stages=1, span=64),
            rebuild=Tile(tokens=16, channels=64, num_stages=1),
            mix_backward=Tile(tokens=16, channels=64),
            streams_backward=Tile(tokens=16, channels=32, num_stages=2),
            post_backward=Tile(tokens=16, channels=32, num_stages=2),
            pre_backward=Tile(tokens=32, channels=64, num_stages=2),
            weight_backward=Tile(tokens=32, channels=64),
        )
    # Measured at T = 4096, C = 2560: on an H100 post, rebuild, and of four streams
    # mix_backward_norm, streams_backward and weight_backward, the others on an H200.
    if num_streams == 2:
        return Tiles(
            mix=Tile(tokens=16, channels=64, num_stages=5),
            post=Tile(tokens=16, channels=128, num_stages=1, span=128),
            rebuild=Tile(tokens=16, channels=128, num_stages=1),
            mix_backward=Tile(tokens=4, channels=128, num_warps=1),
            mix_backward_norm=Tile(tokens=16, channels=128),
            streams_backward=Tile(tokens=16, channels=64),
            post_backward=Tile(tokens=1, channels=256, num_warps=1, num_stages=1),
            pre_backward=Tile(tokens=32, channels=64, num_stages=4),
            weight_backward=Tile(tokens=128, channels=128, num_warps=8, num_stages=4),
            weight_split=2048,
            hopper_pre_backward=HOPPER_PRE_TILE,
            hopper_weight=HOPPER_WEIGHT_TILE,
        )
    return Tiles(
        mix=Tile(tokens=32, channels=64, num_stages=4),
        post=Tile(tokens=16, channels=128, num_stages=1, span=128),
        rebuild=Tile(tokens=16, channels=128, num_stages=1),
        mix_backward=Tile(tokens=4, channels=128, num_warps=1),
        mix_backward_norm=Tile(tokens=16, channels=128),
        streams_backward=Tile(tokens=32, channels=64, num_warps=8),
        post_backward=Tile(tokens=4, channels=256, num_stages=1),
        pre_backward=Tile(tokens=32, channels=64, num_stages=3),
        weight_backward=Tile(tokens=64, channels=64),
        weight_split=2048,
        hopper_mix=HOPPER_MIX_TILE if num_streams == 4 else None,
        hopper_read=Tile(tokens=4, channels=128, num_warps=1),
        hopper_pre_backward=HOPPER_PRE_TILE,
        hopper_weight=HOPPER_WEIGHT_TILE,
    )


def _wide_tiles(dtype: torch.dtype) -> Tiles:
    """Of more than four streams; of bfloat16 none spills registers."""
    if dtype != torch.bfloat16:
        # As of fewer streams: products of float32 parts.
        return Tiles(
            mix=Tile(tokens=16, channels=32),
            project=Tile(tokens=32, channels=16, num_stages=1, span=2560),
            post=Tile(tokens=4, channels=128),
            rebuild=Tile(tokens=16, channels=64, num_stages=1),
            mix_backward=Tile(tokens=16, channels=32),
            post_backward=Tile(tokens=4, channels=128),
            pre_backward=Tile(tokens=32, channels=32, num_warps=8, num_stages=2),
        )
    # Measured at T = 4096, C = 2560, n = 8 on an H200, but rebuild.
    return Tiles(
        mix=Tile(tokens=8, channels=128),
        project=Tile(tokens=128, channels=64, num_warps=8, num_stages=4, span=5120),
        post=Tile(tokens=4, channels=256),
        rebuild=Tile(tokens=16, channels=64, num_stages=1),
        mix_backward=Tile(tokens=32, channels=64),
        post_backward=Tile(tokens=1, channels=128, num_warps=1),
        pre_backward=Tile(tokens=64, channels=64, num_stages=3),
        hopper_pre_backward=HOPPER_PRE_TILE,
    )
