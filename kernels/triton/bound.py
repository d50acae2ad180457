"""The kernels bound to their constants, once for each set of sizes, dtype, options and tile.

Sizes are n, C and M as everywhere; T is none of them, but for the number of partial sums of phi.
"""

from functools import cache

import torch

from mhc_megatron.kernels.options import MappingOptions
from mhc_megatron.kernels.triton import forward, read_forward, wide_forward
from mhc_megatron.kernels.triton import mix_backward as mix_backward_kernel
from mhc_megatron.kernels.triton import pre_backward as pre_backward_kernel
from mhc_megatron.kernels.triton import streams_backward as streams_backward_kernel
from mhc_megatron.kernels.triton import weight_backward as weight_backward_kernel
from mhc_megatron.kernels.triton import wide_backward as wide_backward_kernel
from mhc_megatron.kernels.triton import wide_pre_backward as wide_pre_backward_kernel
from mhc_megatron.kernels.triton.arguments import (
    logit_groups,
    logit_rows,
    padded,
    parts_of,
    precision_of,
    vector_of,
)
from mhc_megatron.kernels.triton.compiled import Launch
from mhc_megatron.kernels.triton.tiles import Tile, blocks

# Numbers of phi per program of the kernels that only copy or add them.
ELEMENTS = 1024
# Channels of a stream per program of ``split_wide``.
SPLIT_CHANNELS = 32
# Numbers of a norm's weight per program of ``reduce_partials``.
NORM_COLUMNS = 64
# More streams than these have kernels of their own, of programs that share a token's channels.
WIDE = 4


def interleaves(n: int, dtype: torch.dtype) -> bool:
    """Whether ``mix_fwd`` multiplies all streams of a chunk at once."""
    return parts_of(dtype) == 2 and n in (1, 2, 4, 8)


@cache
def split_weight(n: int, channels: int, num_logits: int, dtype: torch.dtype, width: int) -> Launch:
    return Launch(
        forward.split_weight,
        SIZE=num_logits * n * channels,
        C=channels,
        N=n,
        INTERLEAVED=interleaves(n, dtype),
        ROWS=logit_rows(num_logits, dtype),
        WIDTH=width,
        BLOCK=ELEMENTS,
        num_warps=4,
    )


@cache
def split_wide(n: int, channels: int, num_logits: int) -> Launch:
    return Launch(
        forward.split_wide,
        C=channels,
        N=n,
        M=num_logits,
        MP=padded(num_logits, 16),
        BC=SPLIT_CHANNELS,
        num_warps=4,
    )


@cache
def post_fwd(
    n: int,
    channels: int,
    num_logits: int,
    dtype: torch.dtype,
    tile: Tile,
    has_bias: bool,
    reads: bool,
    squares: bool,
) -> Launch:
    return Launch(
        forward.post_fwd,
        C=channels,
        N=n,
        M=num_logits,
        HAS_BIAS=has_bias,
        READS=reads,
        SQUARES=squares,
        SPAN=tile.span or channels,
        BT=tile.tokens,
        BC=tile.channels,
        VECTOR=vector_of(dtype, tile),
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )


@cache
def mix_fwd(
    n: int,
    channels: int,
    num_logits: int,
    dtype: torch.dtype,
    options: MappingOptions,
    tile: Tile,
    has_post: bool,
    has_bias: bool,
    single_pass: bool,
    has_norm: bool,
) -> Launch:
    return Launch(
        forward.mix_fwd,
        C=channels,
        N=n,
        NP=padded(n, 2),
        NN=padded(n * n, 2),
        M=num_logits,
        MP=logit_rows(num_logits, dtype),
        PARTS=parts_of(dtype),
        PROJECTION=options.projection,
        ITERATIONS=options.iterations,
        PRECISION=precision_of(dtype),
        HAS_POST=has_post,
        HAS_BIAS=has_bias,
        SINGLE_PASS=single_pass,
        HAS_NORM=has_norm,
        INTERLEAVED=interleaves(n, dtype),
        BT=tile.tokens,
        BC=tile.channels,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )


@cache
def square_fwd(n: int, channels: int, num_logits: int, dtype: torch.dtype, tile: Tile) -> Launch:
    return Launch(
        wide_forward.square_fwd,
        C=channels,
        N=n,
        M=num_logits,
        BT=tile.tokens,
        BC=tile.channels,
        VECTOR=vector_of(dtype, tile),
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )


@cache
def project_fwd(n: int, channels: int, num_logits: int, dtype: torch.dtype, tile: Tile) -> Launch:
    parts = parts_of(dtype)
    head, tail = logit_groups(parts * num_logits)
    return Launch(
        wide_forward.project_fwd,
        C=channels,
        N=n,
        M=num_logits,
        HEAD=head,
        TAIL=tail,
        PARTS=parts,
        PRECISION=precision_of(dtype),
        SPAN=tile.span or n * channels,
        BT=tile.tokens,
        BC=tile.channels,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )


@cache
def read_fwd(
    n: int,
    channels: int,
    num_logits: int,
    dtype: torch.dtype,
    options: MappingOptions,
    tile: Tile,
    splits: int,
    tokens: int,
    reads: bool,
    has_norm: bool,
    squares: bool,
) -> Launch:
    """``tokens``: of each of the ``splits`` programs whose sums it adds up."""
    return Launch(
        read_forward.read_fwd,
        C=channels,
        N=n,
        NP=padded(n, 2),
        NN=padded(n * n, 2),
        M=num_logits,
        LATER=padded(num_logits - n if reads else num_logits, 2),
        PARTS=parts_of(dtype),
        PROJECTION=options.projection,
        ITERATIONS=options.iterations,
        READS=reads,
        HAS_NORM=has_norm,
        SQUARES=squares,
        SPLITS=splits,
        TILE=tokens,
        COUNT=later_tokens(n, tile),
        BT=tile.tokens,
        BC=tile.channels,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )


def later_tokens(n: int, tile: Tile) -> int:
    """Of a program of ``mix_bwd`` or ``read_fwd`` that walks through iterations: one for every
    thread, unless a block of their matrices would fill more than 16 registers; and no fewer than of
    one that reads streams, which ``mix_bwd`` counts for both."""
    return max(tile.tokens, min(32, 512 // padded(n * n, 2)) * tile.num_warps)


@cache
def mix_bwd(
    n: int,
    channels: int,
    num_logits: int,
    dtype: torch.dtype,
    options: MappingOptions,
    tile: Tile,
    single_pass: bool,
    has_grad_packed: bool,
    has_norm: bool,
) -> Launch:
    return Launch(
        mix_backward_kernel.mix_bwd,
        C=channels,
        N=n,
        NP=padded(n, 2),
        NN=padded(n * n, 2),
        M=num_logits,
        PARTS=parts_of(dtype),
        PROJECTION=options.projection,
        ITERATIONS=options.iterations,
        SINGLE_PASS=single_pass,
        HAS_GRAD_PACKED=has_grad_packed,
        HAS_NORM=has_norm,
        COUNT=later_tokens(n, tile),
        BT=tile.tokens,
        BC=tile.channels,
        VECTOR=vector_of(dtype, tile),
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )


@cache
def streams_bwd(
    n: int,
    channels: int,
    num_logits: int,
    dtype: torch.dtype,
    tile: Tile,
    terms: int,
    has_grad_y: bool,
    has_pre: bool,
    has_bias: bool,
    single_pass: bool,
) -> Launch:
    return Launch(
        streams_backward_kernel.streams_bwd,
        C=channels,
        N=n,
        M=num_logits,
        MP=padded(num_logits, 16),
        TERMS=terms if parts_of(dtype) == 2 else 1,
        PRECISION=precision_of(dtype),
        HAS_GRAD_Y=has_grad_y,
        HAS_PRE=has_pre,
        HAS_BIAS=has_bias,
        SINGLE_PASS=single_pass,
        INTERLEAVED=interleaves(n, dtype),
        BT=tile.tokens,
        BC=tile.channels,
        VECTOR=vector_of(dtype, tile),
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )


@cache
def wide_streams_bwd(
    n: int,
    channels: int,
    dtype: torch.dtype,
    tile: Tile,
    has_bias: bool,
    scale_width: int,
    single_pass: bool,
) -> Launch:
    return Launch(
        wide_backward_kernel.wide_streams_bwd,
        C=channels,
        N=n,
        HAS_BIAS=has_bias,
        WIDTH=scale_width,
        SINGLE_PASS=single_pass,
        BT=tile.tokens,
        BC=tile.channels,
        VECTOR=vector_of(dtype, tile),
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )


@cache
def pre_bwd(
    n: int,
    channels: int,
    num_logits: int,
    dtype: torch.dtype,
    tile: Tile,
    split: int,
    terms: int,
    has_grad_y: bool,
    trains: bool,
) -> Launch:
    return Launch(
        pre_backward_kernel.pre_bwd,
        C=channels,
        N=n,
        M=num_logits,
        MP=padded(num_logits, 16),
        ROWS=logit_rows(num_logits, dtype),
        PARTS=parts_of(dtype),
        TERMS=terms if parts_of(dtype) == 2 else 1,
        PRECISION=precision_of(dtype),
        HAS_GRAD_Y=has_grad_y,
        TRAINS=trains,
        INTERLEAVED=interleaves(n, dtype),
        SPLIT=split,
        BT=tile.tokens,
        BC=tile.channels,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )


@cache
def wide_pre_bwd(
    n: int,
    channels: int,
    num_logits: int,
    dtype: torch.dtype,
    tile: Tile,
    split: int,
    terms: int,
    has_grad_y: bool,
    trains: bool,
    scaled: bool,
    single_pass: bool,
) -> Launch:
    head, tail = logit_groups(num_logits)
    return Launch(
        wide_pre_backward_kernel.wide_pre_bwd,
        C=channels,
        N=n,
        M=num_logits,
        HEAD=head,
        TAIL=tail,
        PARTS=parts_of(dtype),
        TERMS=terms if parts_of(dtype) == 2 else 1,
        PRECISION=precision_of(dtype),
        HAS_GRAD_Y=has_grad_y,
        SCALED=scaled,
        SINGLE_PASS=single_pass,
        TRAINS=trains,
        INTERLEAVED=interleaves(n, dtype),
        SPLIT=split,
        BT=tile.tokens,
        BC=tile.channels,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@cache
def weight_bwd(width: int, num_logits: int, dtype: torch.dtype, tile: Tile, split: int) -> Launch:
    return Launch(
        weight_backward_kernel.weight_bwd,
        K=width,
        M=num_logits,
        MP=logit_rows(num_logits, dtype),
        PARTS=parts_of(dtype),
        PRECISION=precision_of(dtype),
        SPLIT=split,
        BT=tile.tokens,
        BK=tile.channels,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )


@cache
def reduce_partials(
    n: int, channels: int, num_logits: int, splits: int, accumulate: bool, has_norm: bool
) -> Launch:
    return Launch(
        weight_backward_kernel.reduce_partials,
        SIZE=num_logits * n * channels,
        SPLITS=splits,
        C=channels,
        N=n,
        M=num_logits,
        ROWS=padded(max(n, num_logits - 2 * n), 2),
        BLOCK=ELEMENTS,
        COLUMNS=256 if n <= WIDE else 64,
        NORM_PROGRAMS=blocks(channels, NORM_COLUMNS) if has_norm else 0,
        NORM_COLUMNS=NORM_COLUMNS,
        ACCUMULATE=accumulate,
        num_warps=4,
    )
