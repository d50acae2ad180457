"""The Triton kernels under autograd.

Kept for backward are streams and branch output, which the graph holds anyway, and float32 numbers
per token (M raw logits, 1/RMS, the mappings): no copy of the streams in another dtype.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhc_megatron.kernels.options import MappingOptions
from mhc_megatron.kernels.triton import launch
from mhc_megatron.kernels.triton.arguments import Parameters
from mhc_megatron.kernels.triton.launch import ReadGradients
from mhc_megatron.kernels.triton.tiles import Tiles


class Post(torch.autograd.Function):
    """``post``: (streams, branch, branch_bias, packed) to the next streams."""

    @staticmethod
    def forward(
        ctx: Any,
        streams: Tensor,
        branch: Tensor,
        branch_bias: Tensor | None,
        packed: Tensor,
        tiles: Tiles,
    ) -> Tensor:
        ctx.save_for_backward(streams, branch, branch_bias, packed)
        ctx.tiles = tiles
        return launch.post(streams, branch, branch_bias, packed, tile=tiles.post)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_streams: Tensor) -> tuple[Tensor | None, ...]:
        streams, branch, branch_bias, packed = ctx.saved_tensors
        if streams.numel() == 0:
            return *_zeros(streams, branch, branch_bias, packed), None
        grad_x, grad_branch, grad_packed = launch.streams_backward(
            grad_streams.contiguous(),
            streams,
            branch,
            branch_bias,
            packed,
            None,
            single_pass=False,
            tile=ctx.tiles.streams_backward,
            terms=ctx.tiles.product_terms,
        )
        return grad_x, grad_branch, _bias_gradient(grad_branch, branch_bias), grad_packed, None


class Pre(torch.autograd.Function):
    """``pre``: (streams, parameters) to (u, packed, the streams again).

    ``post`` takes the last, so that its gradient of the streams comes here to be added to.
    """

    @staticmethod
    def forward(
        ctx: Any,
        streams: Tensor,
        weight: Tensor,
        alpha_pre: Tensor,
        alpha_post: Tensor,
        alpha_res: Tensor | None,
        bias: Tensor,
        options: MappingOptions,
        tiles: Tiles,
    ) -> tuple[Tensor, Tensor, Tensor]:
        parameters = Parameters(weight, alpha_pre, alpha_post, alpha_res, bias)
        factors = launch.factor_weight(weight, streams)
        _, u, raw, packed = launch.mix(
            streams,
            None,
            None,
            None,
            factors,
            parameters,
            options=options,
            single_pass=False,
            tile=tiles.mix,
        )
        ctx.save_for_backward(streams, raw, packed, factors, *parameters)
        ctx.options, ctx.tiles, ctx.trains = options, tiles, _any_requires_grad(parameters)
        ctx.set_materialize_grads(False)
        return u, packed, streams.view_as(streams)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_u: Tensor | None,
        grad_packed: Tensor | None,
        grad_through: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        streams, raw, packed, factors, *rest = ctx.saved_tensors
        parameters = Parameters(*rest)
        if streams.numel() == 0:
            return *_zeros(streams, *parameters), None, None
        read, partial = _read_gradients(
            ctx, streams, grad_u, grad_packed, raw, packed, factors, parameters
        )
        # Right after the first pass, whose last reads of the streams are still in L2.
        parameter_gradients = _parameter_gradients(ctx, streams, read, partial, parameters)
        grad_streams, _, _ = launch.streams_backward(
            None if grad_through is None else grad_through.contiguous(),
            streams,
            None,
            None,
            None,
            read,
            single_pass=False,
            tile=ctx.tiles.streams_backward,
            terms=ctx.tiles.product_terms,
        )
        return grad_streams, *parameter_gradients, None, None


class PostPre(torch.autograd.Function):
    """``post_pre`` and ``single_pass``: (streams, branch, branch_bias, packed, parameters) to
    (next streams, u, packed)."""

    @staticmethod
    def forward(
        ctx: Any,
        streams: Tensor,
        branch: Tensor,
        branch_bias: Tensor | None,
        packed: Tensor,
        weight: Tensor,
        alpha_pre: Tensor,
        alpha_post: Tensor,
        alpha_res: Tensor | None,
        bias: Tensor,
        options: MappingOptions,
        single_pass: bool,
        tiles: Tiles,
    ) -> tuple[Tensor, Tensor, Tensor]:
        parameters = Parameters(weight, alpha_pre, alpha_post, alpha_res, bias)
        factors = launch.factor_weight(weight, streams)
        new_streams, u, raw, new_packed = launch.mix(
            streams,
            branch,
            branch_bias,
            packed,
            factors,
            parameters,
            options=options,
            single_pass=single_pass,
            tile=tiles.mix,
        )
        ctx.save_for_backward(
            streams,
            branch,
            branch_bias,
            packed,
            new_streams,
            raw,
            new_packed,
            factors,
            *parameters,
        )
        ctx.options, ctx.tiles, ctx.single_pass = options, tiles, single_pass
        ctx.trains = _any_requires_grad(parameters)
        ctx.set_materialize_grads(False)
        return new_streams, u, new_packed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_streams: Tensor | None,
        grad_u: Tensor | None,
        grad_new_packed: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        streams, branch, branch_bias, packed, new_streams, raw, new_packed, factors, *rest = (
            ctx.saved_tensors
        )
        parameters = Parameters(*rest)
        if streams.numel() == 0:
            return (
                *_zeros(streams, branch, branch_bias, packed, *parameters),
                None,
                None,
                None,
            )
        read_packed = packed if ctx.single_pass else new_packed
        read, partial = _read_gradients(
            ctx,
            new_streams,
            grad_u,
            grad_new_packed,
            raw,
            read_packed,
            factors,
            parameters,
            single_pass=ctx.single_pass,
        )
        # As in Pre: right after the first pass.
        parameter_gradients = _parameter_gradients(ctx, new_streams, read, partial, parameters)
        grad_x, grad_branch, grad_packed = launch.streams_backward(
            None if grad_streams is None else grad_streams.contiguous(),
            streams,
            branch,
            branch_bias,
            packed,
            read,
            single_pass=ctx.single_pass,
            tile=ctx.tiles.streams_backward,
            terms=ctx.tiles.product_terms,
        )
        return (
            grad_x,
            grad_branch,
            _bias_gradient(grad_branch, branch_bias),
            grad_packed,
            *parameter_gradients,
            None,
            None,
            None,
        )


def _any_requires_grad(parameters: Parameters) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in parameters)


def _read_gradients(
    ctx: Any,
    new_streams: Tensor,
    grad_u: Tensor | None,
    grad_packed: Tensor | None,
    raw: Tensor,
    packed: Tensor,
    factors: Tensor,
    parameters: Parameters,
    *,
    single_pass: bool = False,
) -> tuple[ReadGradients, Tensor]:
    """The first backward pass, and the partial sums of bias and alpha."""
    if grad_u is None:
        shape = (*new_streams.shape[:-2], new_streams.shape[-1])
        grad_u = new_streams.new_zeros(shape)
    grad_u = grad_u.contiguous()
    projected, radial, partial = launch.mix_backward(
        new_streams,
        grad_u,
        None if grad_packed is None else grad_packed.contiguous(),
        raw,
        parameters,
        options=ctx.options,
        single_pass=single_pass,
        tile=ctx.tiles.mix_backward,
    )
    return ReadGradients(grad_u, packed, projected, radial, factors), partial


def _parameter_gradients(
    ctx: Any, new_streams: Tensor, read: ReadGradients, partial: Tensor, parameters: Parameters
) -> tuple[Tensor | None, ...]:
    """In the order of ``Parameters``."""
    if not ctx.trains:
        return (None,) * len(parameters)
    grads = launch.parameter_backward(
        new_streams, read.projected, partial, parameters, tiles=ctx.tiles
    )
    alpha_res = None if parameters.alpha_res is None else grads.alphas[2:3]
    return grads.weight, grads.alphas[0:1], grads.alphas[1:2], alpha_res, grads.bias


def _bias_gradient(grad_branch: Tensor | None, branch_bias: Tensor | None) -> Tensor | None:
    if grad_branch is None or branch_bias is None:
        return None
    summed = grad_branch.flatten(0, -2).sum(dim=0, dtype=torch.float32)
    return summed.to(branch_bias.dtype)


def _zeros(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients where there is no token."""
    return tuple(None if tensor is None else torch.zeros_like(tensor) for tensor in tensors)
