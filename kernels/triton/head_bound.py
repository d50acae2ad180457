"""The kernels of ``expand`` and the contractions bound to their constants; as in bound.py."""

from functools import cache
from typing import Any

import torch

from mhc_megatron.kernels.triton import head_backward, head_forward
from mhc_megatron.kernels.triton.arguments import parts_of, precision_of, vector_of
from mhc_megatron.kernels.triton.bound import ELEMENTS
from mhc_megatron.kernels.triton.compiled import Launch
from mhc_megatron.kernels.triton.tiles import Tile


@cache
def plain(kernel: Any, n: int, channels: int, divisor: int, tile: Tile) -> Launch:
    """``expand_fwd`` or ``contract_fwd``."""
    return Launch(
        kernel,
        C=channels,
        N=n,
        DIVISOR=divisor,
        BT=tile.tokens,
        BC=tile.channels,
        num_warps=tile.num_warps,
    )


@cache
def learned_fwd(n: int, channels: int, tile: Tile) -> Launch:
    return Launch(
        head_forward.learned_fwd,
        C=channels,
        N=n,
        BT=tile.tokens,
        BC=tile.channels,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )


@cache
def learned_weights_bwd(n: int, channels: int, dtype: torch.dtype, tile: Tile) -> Launch:
    return Launch(
        head_backward.learned_weights_bwd,
        C=channels,
        N=n,
        BT=tile.tokens,
        BC=tile.channels,
        VECTOR=vector_of(dtype, tile),
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )


@cache
def learned_streams_bwd(
    n: int, channels: int, dtype: torch.dtype, tile: Tile, trains: bool, split: int
) -> Launch:
    return Launch(
        head_backward.learned_streams_bwd,
        C=channels,
        N=n,
        PARTS=parts_of(dtype),
        PRECISION=precision_of(dtype),
        TRAINS=trains,
        SPLIT=split,
        BT=tile.tokens,
        BC=tile.channels,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )


@cache
def reduce_head(n: int, channels: int) -> Launch:
    return Launch(
        head_backward.reduce_head,
        SIZE=n * n * channels,
        N=n,
        BLOCK=ELEMENTS,
        num_warps=4,
    )
