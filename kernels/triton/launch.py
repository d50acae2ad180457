"""Launches: output buffers, tile sizes and constants of each kernel; no autograd, no checks.

Tensors are contiguous; of streams [..., n, C] and branch [..., C] only the sizes matter here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mhc_megatron.kernels.options import MappingOptions
from mhc_megatron.kernels.triton import forward
from mhc_megatron.kernels.triton import mix_backward as mix_backward_kernel
from mhc_megatron.kernels.triton import streams_backward as streams_backward_kernel
from mhc_megatron.kernels.triton import weight_backward as weight_backward_kernel
from mhc_megatron.kernels.triton.arguments import (
    ParameterGradients,
    Parameters,
    Shape,
    blocks,
    logit_rows,
    matrices_of,
    padded,
    parts_of,
    precision_of,
    vector_of,
)
from mhc_megatron.kernels.triton.compiled import CompiledKernels
from mhc_megatron.kernels.triton.recompute import rebuild_fwd
from mhc_megatron.kernels.triton.tiles import Tile, Tiles

split_weight = CompiledKernels(forward.split_weight)
mix_fwd = CompiledKernels(forward.mix_fwd)
post_fwd = CompiledKernels(forward.post_fwd)
mix_bwd = CompiledKernels(mix_backward_kernel.mix_bwd)
streams_bwd = CompiledKernels(streams_backward_kernel.streams_bwd)
weight_bwd = CompiledKernels(weight_backward_kernel.weight_bwd)
reduce_partials = CompiledKernels(weight_backward_kernel.reduce_partials)

# Sublayers that one launch of rebuild_fwd walks through: its code is unrolled over them. A longer
# block is cut, and the state read again at each cut.
REBUILT_TOGETHER = 8


def interleaves(shape: Shape, dtype: torch.dtype) -> bool:
    """Whether ``mix_fwd`` multiplies all streams of a chunk at once."""
    return parts_of(dtype) == 2 and shape.num_streams in (1, 2, 4)


def factor_weight(weight: Tensor, streams: Tensor) -> Tensor:
    """phi as the products with ``streams`` take it, forward and backward: [PARTS, M, K]."""
    shape, dtype = Shape.of(streams), streams.dtype
    if parts_of(dtype) == 1:
        return weight
    split = torch.empty((2, *weight.shape), dtype=torch.bfloat16, device=weight.device)
    block = 1024
    grid = (blocks(weight.numel(), block),)
    split_weight[grid](
        weight,
        split,
        SIZE=weight.numel(),
        C=shape.channels,
        N=shape.num_streams,
        INTERLEAVED=interleaves(shape, dtype),
        BLOCK=block,
        num_warps=4,
    )
    return split


def post(
    streams: Tensor, branch: Tensor, branch_bias: Tensor | None, packed: Tensor, *, tile: Tile
) -> Tensor:
    """The next streams."""
    shape = Shape.of(streams)
    new_streams = torch.empty_like(streams)
    if shape.num_tokens:
        grid = (
            blocks(shape.num_tokens, tile.tokens),
            blocks(shape.channels, tile.channels),
        )
        post_fwd[grid](
            streams,
            branch,
            branch_bias,
            packed,
            new_streams,
            shape.num_tokens,
            C=shape.channels,
            N=shape.num_streams,
            HAS_BIAS=branch_bias is not None,
            BT=tile.tokens,
            BC=tile.channels,
            num_warps=tile.num_warps,
        )
    return new_streams


def mix(
    streams: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    packed: Tensor | None,
    factors: Tensor,
    parameters: Parameters,
    *,
    options: MappingOptions,
    single_pass: bool,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``post_pre``, or ``pre`` without branch: streams, u, raw [M + 1, T], packed.

    ``factors``: of ``factor_weight``.
    """
    shape = Shape.of(streams)
    num_tokens, n, channels = shape
    num_logits = parameters.bias.numel()
    new_streams = streams if branch is None else torch.empty_like(streams)
    device = streams.device
    u = torch.empty((*streams.shape[:-2], channels), dtype=streams.dtype, device=device)
    raw = torch.empty((num_logits + 1, num_tokens), dtype=torch.float32, device=device)
    new_packed = torch.empty((n * (n + 2), num_tokens), dtype=torch.float32, device=device)
    if num_tokens:
        mix_fwd[(blocks(num_tokens, tile.tokens),)](
            streams,
            branch,
            branch_bias,
            packed,
            factors,
            parameters.alpha_pre,
            parameters.alpha_post,
            parameters.alpha_res,
            parameters.bias,
            matrices_of(options, streams),
            new_streams,
            u,
            raw,
            new_packed,
            num_tokens,
            options.rms_eps,
            options.eps,
            C=channels,
            N=n,
            NP=padded(n, 2),
            NN=padded(n * n, 2),
            M=num_logits,
            MP=logit_rows(num_logits, streams.dtype),
            PARTS=parts_of(streams.dtype),
            PROJECTION=options.projection,
            ITERATIONS=options.iterations,
            PRECISION=precision_of(streams.dtype),
            HAS_POST=branch is not None,
            HAS_BIAS=branch_bias is not None,
            SINGLE_PASS=single_pass,
            INTERLEAVED=interleaves(shape, streams.dtype),
            BT=tile.tokens,
            BC=tile.channels,
            STAGES=tile.num_stages,
            num_warps=tile.num_warps,
        )
    return new_streams, u, raw, new_packed


def rebuild(
    streams: Tensor,
    branches: Sequence[Tensor],
    branch_biases: Sequence[Tensor | None],
    packed: Sequence[Tensor],
    new_streams: Sequence[Tensor],
    branch_inputs: Sequence[Tensor],
    *,
    tile: Tile,
) -> None:
    """Fill ``new_streams`` and ``branch_inputs`` of a block; see ``kernels.rebuild``."""
    shape = Shape.of(streams)
    if not shape.num_tokens:
        return
    grid = (blocks(shape.num_tokens, tile.tokens), blocks(shape.channels, tile.channels))
    for first in range(0, len(packed), REBUILT_TOGETHER):
        cut = slice(first, first + REBUILT_TOGETHER)
        biases = branch_biases[cut]
        # Once per block, and with tuples of tensors: launched by Triton itself.
        rebuild_fwd[grid](
            streams if first == 0 else new_streams[first - 1],
            tuple(branches[cut]),
            tuple(biases),
            tuple(packed[cut]),
            tuple(new_streams[cut]),
            tuple(branch_inputs[cut]),
            shape.num_tokens,
            C=shape.channels,
            N=shape.num_streams,
            READS=len(packed[cut]),
            WRITES=len(branches[cut]),
            BIASES=sum(1 << index for index, bias in enumerate(biases) if bias is not None),
            BT=tile.tokens,
            BC=tile.channels,
            num_warps=tile.num_warps,
        )


def mix_backward(
    new_streams: Tensor,
    grad_u: Tensor | None,
    grad_packed: Tensor | None,
    raw: Tensor,
    parameters: Parameters,
    *,
    options: MappingOptions,
    single_pass: bool,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``vec(x) phi`` [PARTS * M, T] and of the RMS [T]; partials [2 M, programs]."""
    num_tokens, n, channels = Shape.of(new_streams)
    num_logits = parameters.bias.numel()
    parts = parts_of(new_streams.dtype)
    device = new_streams.device
    factor_dtype = torch.bfloat16 if parts == 2 else torch.float32
    projected = torch.empty((parts * num_logits, num_tokens), dtype=factor_dtype, device=device)
    radial = torch.empty((num_tokens,), dtype=torch.float32, device=device)
    programs = blocks(num_tokens, tile.tokens)
    partial = torch.empty((2 * num_logits, programs), dtype=torch.float32, device=device)
    history = None
    if options.projection in ("sinkhorn", "sinkhorn_v4"):
        rows = 2 * (options.iterations - 1) * n
        history = torch.empty((rows, num_tokens), dtype=torch.float32, device=device)
    mix_bwd[(programs,)](
        new_streams,
        grad_u,
        grad_packed,
        raw,
        parameters.alpha_pre,
        parameters.alpha_post,
        parameters.alpha_res,
        parameters.bias,
        matrices_of(options, new_streams),
        projected,
        radial,
        partial,
        history,
        num_tokens,
        options.eps,
        C=channels,
        N=n,
        NP=padded(n, 2),
        NN=padded(n * n, 2),
        M=num_logits,
        PARTS=parts,
        PROJECTION=options.projection,
        ITERATIONS=options.iterations,
        SINGLE_PASS=single_pass,
        HAS_GRAD_PACKED=grad_packed is not None,
        BT=tile.tokens,
        BC=tile.channels,
        VECTOR=vector_of(new_streams.dtype, tile),
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )
    return projected, radial, partial


class ReadGradients(NamedTuple):
    """What ``streams_backward`` needs of the sublayer that reads the streams.

    Attributes:
        u: gradient of u, [..., C].
        packed: that sublayer's mappings; with ``single_pass`` the previous ones'.
        projected, radial: from ``mix_backward``.
        factors: phi, of ``factor_weight``.
    """

    u: Tensor
    packed: Tensor
    projected: Tensor
    radial: Tensor
    factors: Tensor


def streams_backward(
    grad_streams: Tensor | None,
    streams: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    packed: Tensor | None,
    read: ReadGradients | None,
    *,
    single_pass: bool,
    tile: Tile,
    terms: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of streams, branch and the mappings that wrote; the last two with a branch."""
    shape = Shape.of(streams)
    num_tokens, n, channels = shape
    dtype, device = streams.dtype, streams.device
    grad_x = torch.empty_like(streams)
    grad_branch = grad_packed = None
    if branch is not None:
        grad_branch = torch.empty_like(branch)
        grad_packed = torch.empty((n * (n + 2), num_tokens), dtype=torch.float32, device=device)
    num_logits = 1 if read is None else read.factors.shape[-2]
    streams_bwd[(blocks(num_tokens, tile.tokens),)](
        grad_streams,
        None if read is None else read.u,
        streams,
        branch,
        branch_bias,
        packed,
        None if read is None else read.packed,
        None if read is None else read.projected,
        None if read is None else read.radial,
        None if read is None else read.factors,
        grad_x,
        grad_branch,
        grad_packed,
        num_tokens,
        C=channels,
        N=n,
        M=num_logits,
        MP=padded(num_logits, 16),
        TERMS=terms if parts_of(dtype) == 2 else 1,
        PRECISION=precision_of(dtype),
        HAS_GRAD_Y=grad_streams is not None,
        HAS_PRE=read is not None,
        HAS_POST=branch is not None,
        HAS_BIAS=branch_bias is not None,
        SINGLE_PASS=single_pass,
        INTERLEAVED=interleaves(shape, dtype),
        BT=tile.tokens,
        BC=tile.channels,
        VECTOR=vector_of(dtype, tile),
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )
    return grad_x, grad_branch, grad_packed


def parameter_backward(
    new_streams: Tensor, projected: Tensor, partial: Tensor, parameters: Parameters, *, tiles: Tiles
) -> ParameterGradients:
    """phi's gradient from all tokens, and the sums of the partials."""
    num_tokens, n, _ = Shape.of(new_streams)
    num_logits, width = parameters.weight.shape
    tile = tiles.weight_backward
    splits = blocks(num_tokens, tiles.weight_split)
    device = new_streams.device
    grads = ParameterGradients(
        weight=torch.empty((num_logits, width), dtype=torch.float32, device=device),
        alphas=torch.empty((3,), dtype=torch.float32, device=device),
        bias=torch.empty((num_logits,), dtype=torch.float32, device=device),
    )
    weight_partial = grads.weight
    if splits > 1:
        size = (splits, num_logits, width)
        weight_partial = torch.empty(size, dtype=torch.float32, device=device)
    weight_bwd[(blocks(width, tile.channels), splits)](
        new_streams,
        projected,
        weight_partial,
        num_tokens,
        K=width,
        M=num_logits,
        MP=logit_rows(num_logits, new_streams.dtype),
        PARTS=parts_of(new_streams.dtype),
        PRECISION=precision_of(new_streams.dtype),
        SPLIT=tiles.weight_split,
        BT=tile.tokens,
        BK=tile.channels,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )
    block = 1024
    weight_programs = blocks(num_logits * width, block) if splits > 1 else 0
    reduce_partials[(num_logits + 3 + weight_programs,)](
        weight_partial,
        partial,
        grads.weight,
        grads.bias,
        grads.alphas,
        partial.shape[1],
        SIZE=num_logits * width,
        SPLITS=splits,
        N=n,
        M=num_logits,
        ROWS=padded(max(n, num_logits - 2 * n), 2),
        BLOCK=block,
        COLUMNS=256,
        num_warps=4,
    )
    return grads
