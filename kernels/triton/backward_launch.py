"""Launches of the backward, as those of launch.py."""

from typing import NamedTuple

import torch
from torch import Tensor

from mhc_megatron.kernels.options import MappingOptions
from mhc_megatron.kernels.triton import bound
from mhc_megatron.kernels.triton.arguments import (
    ParameterGradients,
    Parameters,
    Shape,
    blocks,
    matrices_of,
    parts_of,
)
from mhc_megatron.kernels.triton.tiles import Tile, Tiles

# New streams whose sums over channels one launch of streams_bwd makes: n + 1 numbers of a token for
# each. Those of eight need more registers than there are, so it is launched twice.
SUMMED_TOGETHER = 4


def _aligned(size: int) -> int:
    """The next multiple of 4 numbers, 16 bytes: Triton compiles for pointers to such multiples."""
    return size + -size % 4


class NormState(NamedTuple):
    """What ``mix_backward`` needs of the norm of u.

    Attributes:
        weight: [C].
        inverse_rms: [T] float32, of ``mix``.
        packed: the mappings that read u.
    """

    weight: Tensor
    inverse_rms: Tensor
    packed: Tensor


class NormGradients(NamedTuple):
    """The gradient of u before its norm, [..., C], and partial sums of the weight's, [., C]."""

    u: Tensor
    weight_partial: Tensor


def mix_backward(
    new_streams: Tensor,
    grad_u: Tensor | None,
    grad_packed: Tensor | None,
    raw: Tensor,
    parameters: Parameters,
    *,
    options: MappingOptions,
    single_pass: bool,
    norm: NormState | None = None,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor, NormGradients | None]:
    """Gradients of ``vec(x) phi`` [PARTS * M, T] and of the RMS [T]; partials [2 M * programs].

    ``norm``: ``grad_u`` is of the normalised u; the last result takes it on.
    """
    num_tokens, n, channels = Shape.of(new_streams)
    num_logits = parameters.bias.shape[0]
    dtype, device = new_streams.dtype, new_streams.device
    parts = parts_of(dtype)
    factor_dtype = torch.bfloat16 if parts == 2 else torch.float32
    projected = torch.empty((parts * num_logits, num_tokens), dtype=factor_dtype, device=device)
    programs = blocks(num_tokens, tile.tokens)
    iterates = options.projection in ("sinkhorn", "sinkhorn_v4")
    rows = 2 * (options.iterations - 1) * n if iterates else 0
    # One allocation of all float32 scratch.
    sizes = _aligned(num_tokens), _aligned(rows * num_tokens), 2 * num_logits * programs
    scratch = torch.empty((sum(sizes),), dtype=torch.float32, device=device)
    radial, history, partial = scratch.split_with_sizes(sizes)
    weight = inverse_rms = packed = gradients = None
    if norm is not None:
        assert grad_u is not None
        weight, inverse_rms, packed = norm
        sums = torch.empty((programs, channels), dtype=torch.float32, device=device)
        gradients = NormGradients(torch.empty_like(grad_u, dtype=dtype), sums)
    kernel = bound.mix_bwd(
        n,
        channels,
        num_logits,
        dtype,
        options,
        tile,
        single_pass,
        grad_packed is not None,
        norm is not None,
    )
    kernel(
        (programs,),
        (
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
            history if iterates else None,
            packed,
            weight,
            inverse_rms,
            *(gradients or (None, None)),
        ),
        (num_tokens, options.eps),
    )
    return projected, radial, partial, gradients


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
    branch: Tensor,
    branch_bias: Tensor | None,
    packed: Tensor,
    read: ReadGradients | None,
    *,
    single_pass: bool,
    tile: Tile,
    terms: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of streams, branch and the mappings that wrote."""
    num_tokens, n, channels = Shape.of(streams)
    grad_x = torch.empty_like(streams)
    grad_branch = torch.empty_like(branch)
    grad_packed = torch.empty_like(packed)
    u, read_packed, projected, radial, factors = read or (None,) * len(ReadGradients._fields)
    for first in range(0, n, SUMMED_TOGETHER):
        kernel = bound.streams_bwd(
            n,
            channels,
            1 if factors is None else factors.shape[-2],
            streams.dtype,
            tile,
            terms,
            grad_streams is not None,
            read is not None,
            branch_bias is not None,
            single_pass,
            first,
            min(first + SUMMED_TOGETHER, n),
        )
        kernel(
            (blocks(num_tokens, tile.tokens),),
            (
                grad_streams,
                u,
                streams,
                branch,
                branch_bias,
                packed,
                read_packed,
                projected,
                radial,
                factors,
                grad_x,
                grad_branch,
                grad_packed,
            ),
            (num_tokens,),
        )
    return grad_x, grad_branch, grad_packed


class WeightSums(NamedTuple):
    """phi's gradient, and its sums by tokens, from which ``parameter_backward`` makes it.

    Attributes:
        weight: the gradient, [M, K] float32; ``main_grad`` if there is one.
        partial: [splits, M, K] float32; ``weight`` itself where nothing is to be added up.
        splits: of the tokens.
        accumulates: the sums are added to what ``weight`` holds.
    """

    weight: Tensor
    partial: Tensor
    splits: int
    accumulates: bool

    @classmethod
    def empty(
        cls, num_tokens: int, split: int, weight: Tensor, main_grad: Tensor | None
    ) -> "WeightSums":
        """For the sums of a kernel, to be added up in ``main_grad`` if there is one."""
        splits = blocks(num_tokens, split)
        grad = torch.empty_like(weight) if main_grad is None else main_grad
        if splits == 1 and main_grad is None:
            return cls(grad, grad, splits, False)
        size = (splits, *weight.shape)
        partial = torch.empty(size, dtype=torch.float32, device=weight.device)
        return cls(grad, partial, splits, main_grad is not None)


def weight_backward(
    new_streams: Tensor,
    projected: Tensor,
    weight: Tensor,
    *,
    tiles: Tiles,
    main_grad: Tensor | None = None,
) -> WeightSums:
    """phi's gradient from all tokens; with ``main_grad`` to be added to it."""
    num_tokens = Shape.of(new_streams).num_tokens
    num_logits, width = weight.shape
    tile, split = tiles.weight_backward, tiles.weight_split
    sums = WeightSums.empty(num_tokens, split, weight, main_grad)
    kernel = bound.weight_bwd(width, num_logits, new_streams.dtype, tile, split)
    kernel(
        (blocks(width, tile.channels), sums.splits),
        (new_streams, projected, sums.partial),
        (num_tokens,),
    )
    return sums


def pre_backward(
    grad_streams: Tensor | None,
    streams: Tensor,
    read: ReadGradients,
    weight: Tensor,
    *,
    trains: bool,
    tiles: Tiles,
    main_grad: Tensor | None = None,
) -> tuple[Tensor, WeightSums | None]:
    """Of ``pre`` alone: the gradient of the streams, and with ``trains`` phi's."""
    num_tokens, n, channels = Shape.of(streams)
    tile, split = tiles.pre_backward, tiles.pre_split
    grad_x = torch.empty_like(streams)
    sums = WeightSums.empty(num_tokens, split, weight, main_grad) if trains else None
    kernel = bound.pre_bwd(
        n,
        channels,
        weight.shape[0],
        streams.dtype,
        tile,
        split,
        tiles.product_terms,
        grad_streams is not None,
        trains,
    )
    kernel(
        (blocks(channels, tile.channels) * n, blocks(num_tokens, split)),
        (
            grad_streams,
            read.u,
            streams,
            read.packed,
            read.projected,
            read.radial,
            read.factors,
            grad_x,
            None if sums is None else sums.partial,
        ),
        (num_tokens,),
    )
    return grad_x, sums


def parameter_backward(
    sums: WeightSums,
    partial: Tensor,
    shape: Shape,
    *,
    norm: tuple[Tensor, Tensor] | None = None,
) -> tuple[ParameterGradients, Tensor | None]:
    """The sums of all partial sums; with ``main_grad`` phi's is it.

    Args:
        sums: of phi.
        partial: of the alphas and the bias, from ``mix_backward``.
        shape: of the streams.
        norm: a norm's weight and the partial sums of its gradient, which is the last result.
    """
    _, n, channels = shape
    num_logits, width = sums.weight.shape
    # One allocation of the small ones; the alphas side by side, as the kernel writes them.
    gap = -num_logits % 4
    small = torch.empty((num_logits + gap + 3,), dtype=torch.float32, device=partial.device)
    sizes = (num_logits, gap, 1, 1, 1)
    bias, _, alpha_pre, alpha_post, alpha_res = small.split_with_sizes(sizes)
    norm_partial = grad_norm = None
    programs = num_logits + 3
    if norm is not None:
        norm_weight, norm_partial = norm
        grad_norm = torch.empty_like(norm_weight)
        programs += blocks(channels, bound.NORM_COLUMNS)
    if sums.partial is not sums.weight:
        programs += blocks(num_logits * width, bound.ELEMENTS)
    reduction = bound.reduce_partials(
        n, channels, num_logits, sums.splits, sums.accumulates, norm is not None
    )
    reduction(
        (programs,),
        (sums.partial, partial, norm_partial, sums.weight, bias, alpha_pre, grad_norm),
        (partial.shape[0] // (2 * num_logits),),
    )
    return ParameterGradients(sums.weight, alpha_pre, alpha_post, alpha_res, bias), grad_norm
