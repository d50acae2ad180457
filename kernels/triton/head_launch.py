"""Launches of the kernels that lead into the n streams and out of them; as in launch.py."""

from typing import NamedTuple

import torch
from torch import Tensor

from mhc_megatron.kernels.triton import head_bound, head_forward
from mhc_megatron.kernels.triton.arguments import Shape
from mhc_megatron.kernels.triton.bound import ELEMENTS
from mhc_megatron.kernels.triton.head_tiles import HeadTiles
from mhc_megatron.kernels.triton.tiles import Tile, blocks


class HeadParameters(NamedTuple):
    """Of the learned contraction, all float32: weight [n, n*C], scale [1], bias [n]."""

    weight: Tensor
    scale: Tensor
    bias: Tensor


def expand(hidden: Tensor, num_streams: int, *, divisor: int, tile: Tile) -> Tensor:
    """n copies of ``hidden / divisor``."""
    channels = hidden.shape[-1]
    shape = (*hidden.shape[:-1], num_streams, channels)
    streams = torch.empty(shape, dtype=hidden.dtype, device=hidden.device)
    num_tokens = hidden.numel() // channels
    if num_tokens:
        kernel = head_bound.plain(head_forward.expand_fwd, num_streams, channels, divisor, tile)
        grid = (blocks(num_tokens, tile.tokens), blocks(channels, tile.channels))
        kernel(grid, (hidden, streams), (num_tokens,))
    return streams


def contract(streams: Tensor, *, divisor: int, tile: Tile) -> Tensor:
    """The sum of the streams over ``divisor``."""
    num_tokens, n, channels = Shape.of(streams)
    shape = (*streams.shape[:-2], channels)
    hidden = torch.empty(shape, dtype=streams.dtype, device=streams.device)
    if num_tokens:
        kernel = head_bound.plain(head_forward.contract_fwd, n, channels, divisor, tile)
        grid = (blocks(num_tokens, tile.tokens), blocks(channels, tile.channels))
        kernel(grid, (streams, hidden), (num_tokens,))
    return hidden


def contract_learned(
    streams: Tensor, parameters: HeadParameters, *, rms_eps: float, eps: float, tile: Tile
) -> tuple[Tensor, Tensor]:
    """The weighted sum, and raw [n + 1, T] for backward."""
    num_tokens, n, channels = Shape.of(streams)
    device = streams.device
    shape = (*streams.shape[:-2], channels)
    hidden = torch.empty(shape, dtype=streams.dtype, device=device)
    raw = torch.empty((n + 1, num_tokens), dtype=torch.float32, device=device)
    if num_tokens:
        kernel = head_bound.learned_fwd(n, channels, tile)
        kernel(
            (blocks(num_tokens, tile.tokens),),
            (streams, *parameters, hidden, raw),
            (num_tokens, rms_eps, eps),
        )
    return hidden, raw


def contract_learned_backward(
    grad: Tensor,
    streams: Tensor,
    raw: Tensor,
    parameters: HeadParameters,
    *,
    eps: float,
    trains: bool,
    tiles: HeadTiles,
) -> tuple[Tensor, HeadParameters | None]:
    """Gradients of the streams, and with ``trains`` of the parameters."""
    num_tokens, n, channels = Shape.of(streams)
    dtype, device = streams.dtype, streams.device
    tile = tiles.weights_backward
    programs = blocks(num_tokens, tile.tokens)
    coefficients = torch.empty((2 * n + 1, num_tokens), dtype=torch.float32, device=device)
    partial = torch.empty((n + 1, programs), dtype=torch.float32, device=device)
    weights_kernel = head_bound.learned_weights_bwd(n, channels, dtype, tile)
    weights_kernel(
        (programs,),
        (streams, grad, raw, parameters.scale, parameters.bias, coefficients, partial),
        (num_tokens, eps),
    )
    tile = tiles.streams_backward
    splits = blocks(num_tokens, tiles.split)
    grad_streams = torch.empty_like(streams)
    weight_partial = None
    if trains:
        size = (splits, *parameters.weight.shape)
        weight_partial = torch.empty(size, dtype=torch.float32, device=device)
    streams_kernel = head_bound.learned_streams_bwd(n, channels, dtype, tile, trains, tiles.split)
    streams_kernel(
        (blocks(channels, tile.channels), splits),
        (streams, grad, parameters.weight, coefficients, grad_streams, weight_partial),
        (num_tokens,),
    )
    if weight_partial is None:
        return grad_streams, None
    grads = HeadParameters(*(torch.empty_like(parameter) for parameter in parameters))
    reduction = head_bound.reduce_head(n, channels)
    reduction(
        (n + 1 + blocks(n * n * channels, ELEMENTS),),
        (weight_partial, partial, grads.weight, grads.bias, grads.scale),
        (splits, programs),
    )
    return grad_streams, grads
