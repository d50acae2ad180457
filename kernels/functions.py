"""The Triton kernels under autograd.

Kept for backward are streams and branch output, which the graph holds anyway, and float32 numbers
per token (M raw logits, 1/RMS of the streams and of a normalised branch input, the mappings): no
copy of the streams in another dtype, and no branch input, which is mixed again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhc_megatron.kernels.options import MappingOptions
from mhc_megatron.kernels.triton import backward_launch, launch
from mhc_megatron.kernels.triton.arguments import Norm, Parameters, Shape
from mhc_megatron.kernels.triton.backward_launch import NormState, ReadGradients, WeightSums
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
        grad_x, grad_branch, grad_packed = backward_launch.streams_backward(
            grad_streams.contiguous(),
            streams,
            branch,
            branch_bias,
            packed,
            None,
            single_pass=False,
            tile=ctx.tiles.post_backward,
            terms=ctx.tiles.product_terms,
        )
        return grad_x, grad_branch, _bias_gradient(grad_branch, branch_bias), grad_packed, None


class Pre(torch.autograd.Function):
    """``pre``: (streams, parameters) to (u, packed, the streams again, 1/RMS of u).

    ``post`` takes the third, so that its gradient of the streams comes here to be added to. With
    ``norm_weight`` u is normalised; without, the last is None.
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
        main_grad: Tensor | None,
        norm_weight: Tensor | None,
        norm_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        parameters = Parameters(weight, alpha_pre, alpha_post, alpha_res, bias)
        factors = launch.factor_weight(weight, streams)
        _, u, raw, packed, inverse_rms = launch.mix(
            streams,
            None,
            None,
            None,
            factors,
            parameters,
            options=options,
            single_pass=False,
            norm=_norm(norm_weight, norm_eps),
            tile=tiles.mix,
        )
        ctx.save_for_backward(streams, raw, packed, factors, norm_weight, inverse_rms, *parameters)
        ctx.options, ctx.tiles = options, tiles
        _remember_parameters(ctx, parameters, main_grad)
        ctx.set_materialize_grads(False)
        _keep_without_gradient(ctx, inverse_rms)
        return u, packed, streams.view_as(streams), inverse_rms

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_u: Tensor | None,
        grad_packed: Tensor | None,
        grad_through: Tensor | None,
        grad_inverse_rms: None,
    ) -> tuple[Tensor | None, ...]:
        streams, raw, packed, factors, norm_weight, inverse_rms, *rest = ctx.saved_tensors
        parameters = Parameters(*rest)
        if streams.numel() == 0:
            (grad_x,), grads = _zeros(streams), _zero_parameters(ctx, parameters)
            return grad_x, *grads, None, None, None, *_zeros(norm_weight), None
        read, partial, norm = _read_gradients(
            ctx,
            streams,
            grad_u,
            grad_packed,
            raw,
            packed,
            factors,
            norm_weight,
            inverse_rms,
            parameters,
        )
        grad_streams, sums = backward_launch.pre_backward(
            None if grad_through is None else grad_through.contiguous(),
            streams,
            read,
            parameters.weight,
            trains=ctx.trains or norm is not None,
            tiles=ctx.tiles,
            main_grad=ctx.main_grad,
        )
        parameter_gradients, grad_norm_weight = _parameter_gradients(
            ctx, sums, partial, Shape.of(streams), norm, parameters
        )
        return grad_streams, *parameter_gradients, None, None, None, grad_norm_weight, None


class PostPre(torch.autograd.Function):
    """``post_pre`` and ``single_pass``: (streams, branch, branch_bias, packed, parameters) to
    (next streams, u, packed, 1/RMS of u); the last as for ``pre``."""

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
        main_grad: Tensor | None,
        norm_weight: Tensor | None,
        norm_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        parameters = Parameters(weight, alpha_pre, alpha_post, alpha_res, bias)
        factors = launch.factor_weight(weight, streams)
        new_streams, u, raw, new_packed, inverse_rms = launch.mix(
            streams,
            branch,
            branch_bias,
            packed,
            factors,
            parameters,
            options=options,
            single_pass=single_pass,
            norm=_norm(norm_weight, norm_eps),
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
            norm_weight,
            inverse_rms,
            *parameters,
        )
        ctx.options, ctx.tiles, ctx.single_pass = options, tiles, single_pass
        _remember_parameters(ctx, parameters, main_grad)
        ctx.set_materialize_grads(False)
        _keep_without_gradient(ctx, inverse_rms)
        return new_streams, u, new_packed, inverse_rms

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_streams: Tensor | None,
        grad_u: Tensor | None,
        grad_new_packed: Tensor | None,
        grad_inverse_rms: None,
    ) -> tuple[Tensor | None, ...]:
        streams, branch, branch_bias, packed, *rest = ctx.saved_tensors
        new_streams, raw, new_packed, factors, norm_weight, inverse_rms, *rest = rest
        parameters = Parameters(*rest)
        if streams.numel() == 0:
            return (
                *_zeros(streams, branch, branch_bias, packed),
                *_zero_parameters(ctx, parameters),
                None,
                None,
                None,
                None,
                *_zeros(norm_weight),
                None,
            )
        read_packed = packed if ctx.single_pass else new_packed
        read, partial, norm = _read_gradients(
            ctx,
            new_streams,
            grad_u,
            grad_new_packed,
            raw,
            read_packed,
            factors,
            norm_weight,
            inverse_rms,
            parameters,
            single_pass=ctx.single_pass,
        )
        sums = None
        if ctx.trains or norm is not None:
            # Right after the first pass, whose last reads of the streams are still in L2.
            sums = backward_launch.weight_backward(
                new_streams,
                read.projected,
                parameters.weight,
                tiles=ctx.tiles,
                main_grad=ctx.main_grad,
            )
        parameter_gradients, grad_norm_weight = _parameter_gradients(
            ctx, sums, partial, Shape.of(streams), norm, parameters
        )
        grad_x, grad_branch, grad_packed = backward_launch.streams_backward(
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
            None,
            grad_norm_weight,
            None,
        )


def _norm(weight: Tensor | None, eps: float) -> Norm | None:
    return None if weight is None else Norm(weight, eps)


def _keep_without_gradient(ctx: Any, inverse_rms: Tensor | None) -> None:
    if inverse_rms is not None:
        ctx.mark_non_differentiable(inverse_rms)


def _remember_parameters(ctx: Any, parameters: Parameters, main_grad: Tensor | None) -> None:
    """Which gradients are wanted, and where phi's goes.

    ``main_grad`` is not among the saved tensors, which other backward passes must not change.
    """
    ctx.trains = any([tensor is not None and tensor.requires_grad for tensor in parameters])
    ctx.main_grad = main_grad if parameters.weight.requires_grad else None


def _read_gradients(
    ctx: Any,
    new_streams: Tensor,
    grad_u: Tensor | None,
    grad_packed: Tensor | None,
    raw: Tensor,
    packed: Tensor,
    factors: Tensor,
    norm_weight: Tensor | None,
    inverse_rms: Tensor | None,
    parameters: Parameters,
    *,
    single_pass: bool = False,
) -> tuple[ReadGradients, Tensor, tuple[Tensor, Tensor] | None]:
    """The first backward pass, and the partial sums of bias and alpha; and those of the norm's
    weight, after it."""
    if grad_u is None:
        shape = (*new_streams.shape[:-2], new_streams.shape[-1])
        grad_u = new_streams.new_zeros(shape)
    grad_u = grad_u.contiguous()
    norm, tile = None, ctx.tiles.mix_backward
    if norm_weight is not None:
        assert inverse_rms is not None
        tile = ctx.tiles.mix_backward_norm or tile
        norm = NormState(norm_weight, inverse_rms, packed)
    projected, radial, partial, norm_gradients = backward_launch.mix_backward(
        new_streams,
        grad_u,
        None if grad_packed is None else grad_packed.contiguous(),
        raw,
        parameters,
        options=ctx.options,
        single_pass=single_pass,
        norm=norm,
        tile=tile,
    )
    norm_partial = None
    if norm_gradients is not None:
        assert norm_weight is not None
        grad_u = norm_gradients.u
        norm_partial = norm_weight, norm_gradients.weight_partial
    return ReadGradients(grad_u, packed, projected, radial, factors), partial, norm_partial


def _parameter_gradients(
    ctx: Any,
    sums: WeightSums | None,
    partial: Tensor,
    shape: Shape,
    norm: tuple[Tensor, Tensor] | None,
    parameters: Parameters,
) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
    """In the order of ``Parameters``, and the norm's weight's; without ``sums`` there is none."""
    if sums is None:
        return (None,) * len(parameters), None
    grads, grad_norm_weight = backward_launch.parameter_backward(sums, partial, shape, norm=norm)
    weight, alpha_pre, alpha_post, alpha_res, bias = grads
    return (
        weight if ctx.main_grad is None else None,
        alpha_pre,
        alpha_post,
        None if parameters.alpha_res is None else alpha_res,
        bias,
    ), grad_norm_weight


def _zero_parameters(ctx: Any, parameters: Parameters) -> tuple[Tensor | None, ...]:
    weight, *others = parameters
    return _zeros(weight if ctx.main_grad is None else None, *others)


def _bias_gradient(grad_branch: Tensor | None, branch_bias: Tensor | None) -> Tensor | None:
    if grad_branch is None or branch_bias is None:
        return None
    summed = grad_branch.flatten(0, -2).sum(dim=0, dtype=torch.float32)
    return summed.to(branch_bias.dtype)


def _zeros(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients where there is no token."""
    return tuple(None if tensor is None else torch.zeros_like(tensor) for tensor in tensors)
