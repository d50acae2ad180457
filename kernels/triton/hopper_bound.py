"""The Hopper kernels of bfloat16 streams with their constants, and which tiles they can have."""

from functools import cache

import torch

from mhc_megatron.kernels.triton import bound, hopper
from mhc_megatron.kernels.triton.arguments import logit_groups, logit_rows
from mhc_megatron.kernels.triton.compiled import Launch
from mhc_megatron.kernels.triton.tiles import Tile


@cache
def hopper_mix_fwd(
    n: int,
    channels: int,
    num_logits: int,
    tile: Tile,
    has_post: bool,
    has_bias: bool,
    single_pass: bool,
) -> Launch:
    """Of bfloat16 streams, with ``read_fwd`` in the place of ``mix_fwd``.

    Raises:
        ValueError: the tile is none that tensor cores and the copies ahead of them can have.
    """
    span = tile.span or channels
    possible = tile.tokens in (32, 64) and tile.channels == 64 and tile.num_warps in (4, 8)
    if not possible or tile.num_stages < 2 or (tile.span or 0) % tile.channels:
        raise ValueError(
            "tiles.hopper_mix: expected 32 or 64 tokens, 64 channels, 4 or 8 warps, at least 2 "
            f"stages and a span that is a multiple of the channels, got {tile}"
        )
    return Launch(
        hopper.hopper_mix_fwd,
        C=channels,
        N=n,
        M=num_logits,
        ROWS=logit_rows(num_logits, torch.bfloat16),
        HAS_POST=has_post,
        HAS_BIAS=has_bias,
        SINGLE_PASS=single_pass,
        SPAN=span,
        BT=tile.tokens,
        BC=tile.channels,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )


@cache
def hopper_pre_bwd(
    n: int,
    channels: int,
    num_logits: int,
    tile: Tile,
    split: int,
    terms: int,
    has_grad_y: bool,
    trains: bool,
    scaled: bool,
    single_pass: bool,
) -> Launch:
    """Of bfloat16 streams, in the place of ``pre_bwd`` or ``wide_pre_bwd``.

    Raises:
        ValueError: the tile is none that tensor cores and the copies ahead of them can have.
    """
    possible = tile.tokens in (64, 128) and tile.channels in (64, 128)
    if not possible or tile.num_warps not in (4, 8) or tile.num_stages < 2:
        raise ValueError(
            "tiles.hopper_pre_backward: expected 64 or 128 tokens and channels, 4 or 8 warps and "
            f"at least 2 stages, got {tile}"
        )
    head, tail = logit_groups(num_logits)
    return Launch(
        hopper.hopper_pre_bwd,
        C=channels,
        N=n,
        M=num_logits,
        HEAD=head,
        TAIL=tail,
        TERMS=terms,
        HAS_GRAD_Y=has_grad_y,
        SCALED=scaled,
        SINGLE_PASS=single_pass,
        TRAINS=trains,
        WIDE=n > bound.WIDE,
        SPLIT=split,
        BT=tile.tokens,
        BC=tile.channels,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )


@cache
def hopper_weight_bwd(width: int, num_logits: int, tile: Tile, split: int) -> Launch:
    """Of bfloat16 streams, in the place of ``weight_bwd``.

    Raises:
        ValueError: the tile is none that tensor cores and the copies ahead of them can have.
    """
    possible = tile.tokens in (64, 128) and tile.channels in (64, 128, 256)
    if not possible or tile.num_warps not in (4, 8) or tile.num_stages < 2:
        raise ValueError(
            "tiles.hopper_weight: expected 64 or 128 tokens, 64, 128 or 256 channels, 4 or 8 warps "
            f"and at least 2 stages, got {tile}"
        )
    head, tail = logit_groups(num_logits)
    return Launch(
        hopper.hopper_weight_bwd,
        K=width,
        M=num_logits,
        HEAD=head,
        TAIL=tail,
        SPLIT=split,
        BT=tile.tokens,
        BC=tile.channels,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )
