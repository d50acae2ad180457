"""Launches: output buffers, grid and arguments of each kernel; no autograd, no checks.

Of the forward and of a rebuild; backward_launch.py has the backward's.

Tensors are contiguous; of streams [..., n, C] and branch [..., C] only the sizes matter here.
Every line is paid at every launch, by a host that has less time than the GPU at small sizes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mhc_megatron.kernels.options import MappingOptions
from mhc_megatron.kernels.triton import bound
from mhc_megatron.kernels.triton.arguments import (
    Norm,
    Parameters,
    Shape,
    blocks,
    matrices_of,
    parts_of,
)
from mhc_megatron.kernels.triton.recompute import rebuild_fwd
from mhc_megatron.kernels.triton.tiles import Tile

# Sublayers that one launch of rebuild_fwd walks through: its code is unrolled over them. A longer
# block is cut, and the state read again at each cut.
REBUILT_TOGETHER = 8


def factor_weight(weight: Tensor, streams: Tensor) -> Tensor:
    """phi as the products with ``streams`` take it, forward and backward: [PARTS, M, K]."""
    if parts_of(streams.dtype) == 1:
        return weight
    num_logits, width = weight.shape
    channels = streams.shape[-1]
    split = torch.empty((2, num_logits, width), dtype=torch.bfloat16, device=weight.device)
    kernel = bound.split_weight(width // channels, channels, num_logits, streams.dtype)
    kernel((blocks(num_logits * width, bound.ELEMENTS),), (weight, split))
    return split


def post(
    streams: Tensor, branch: Tensor, branch_bias: Tensor | None, packed: Tensor, *, tile: Tile
) -> Tensor:
    """The next streams."""
    num_tokens, n, channels = Shape.of(streams)
    new_streams = torch.empty_like(streams)
    if num_tokens:
        kernel = bound.post_fwd(n, channels, tile, branch_bias is not None)
        grid = (blocks(num_tokens, tile.tokens), blocks(channels, tile.channels))
        kernel(grid, (streams, branch, branch_bias, packed, new_streams), (num_tokens,))
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
    norm: Norm | None = None,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """``post_pre``, or ``pre`` without branch: streams, u, raw [M + 1, T], packed.

    ``factors``: of ``factor_weight``. ``norm``: u is normalised, and its 1/RMS [T] the last result.
    """
    num_tokens, n, channels = Shape.of(streams)
    dtype, device = streams.dtype, streams.device
    num_logits = parameters.bias.shape[0]
    new_streams = streams if branch is None else torch.empty_like(streams)
    u = torch.empty((*streams.shape[:-2], channels), dtype=dtype, device=device)
    raw = torch.empty((num_logits + 1, num_tokens), dtype=torch.float32, device=device)
    new_packed = torch.empty((n * (n + 2), num_tokens), dtype=torch.float32, device=device)
    inverse_rms = None
    if norm is not None:
        inverse_rms = torch.empty((num_tokens,), dtype=torch.float32, device=device)
    if num_tokens:
        kernel = bound.mix_fwd(
            n,
            channels,
            num_logits,
            dtype,
            options,
            tile,
            branch is not None,
            branch_bias is not None,
            single_pass,
            norm is not None,
        )
        kernel(
            (blocks(num_tokens, tile.tokens),),
            (
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
                None if norm is None else norm.weight,
                inverse_rms,
            ),
            (num_tokens, options.rms_eps, options.eps, 0.0 if norm is None else norm.eps),
        )
    return new_streams, u, raw, new_packed, inverse_rms


def rebuild(
    streams: Tensor,
    branches: Sequence[Tensor],
    branch_biases: Sequence[Tensor | None],
    packed: Sequence[Tensor],
    new_streams: Sequence[Tensor],
    branch_inputs: Sequence[Tensor],
    *,
    norm_weights: Sequence[Tensor | None] | None = None,
    inverse_rms: Sequence[Tensor | None] | None = None,
    tile: Tile,
) -> None:
    """Fill ``new_streams`` and ``branch_inputs`` of a block; see ``kernels.rebuild``."""
    shape = Shape.of(streams)
    if not shape.num_tokens:
        return
    if norm_weights is None or inverse_rms is None:
        norm_weights = inverse_rms = [None] * len(packed)
    grid = (blocks(shape.num_tokens, tile.tokens), blocks(shape.channels, tile.channels))
    for first in range(0, len(packed), REBUILT_TOGETHER):
        cut = slice(first, first + REBUILT_TOGETHER)
        biases, weights = branch_biases[cut], norm_weights[cut]
        # Once per block, and with tuples of tensors: launched by Triton itself.
        rebuild_fwd[grid](
            streams if first == 0 else new_streams[first - 1],
            tuple(branches[cut]),
            tuple(biases),
            tuple(packed[cut]),
            tuple(new_streams[cut]),
            tuple(branch_inputs[cut]),
            tuple(weights),
            tuple(inverse_rms[cut]),
            shape.num_tokens,
            C=shape.channels,
            N=shape.num_streams,
            READS=len(packed[cut]),
            WRITES=len(branches[cut]),
            BIASES=_bits(biases),
            NORMS=_bits(weights),
            BT=tile.tokens,
            BC=tile.channels,
            num_warps=tile.num_warps,
        )


def _bits(given: Sequence[Tensor | None]) -> int:
    """A bit for each that is not None."""
    return sum(1 << index for index, tensor in enumerate(given) if tensor is not None)
