"""The Triton kernels under autograd.

Kept for backward are streams and branch output, which the graph holds anyway, and float32 numbers
per token (M raw logits, 1/RMS of the streams and of a normalised branch input, the mappings): no
copy of the streams in another dtype, and no branch input, which is mixed again.

Gradients have the dtypes of what they are gradients of: autograd casts what is given to it.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhc_megatron.kernels.triton import backward_launch, launch
from mhc_megatron.kernels.triton.arguments import Parameters
from mhc_megatron.kernels.triton.plan import Plan

Gradients = tuple[Tensor | None, ...]


def _once_differentiable(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """torch's, whose cost is paid only where a graph of the backward is asked for."""
    guarded = once_differentiable(backward)

    @wraps(backward)
    def either(ctx: Any, *grads: Tensor | None) -> Gradients:
        gradients: Gradients = (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)
        return gradients

    return either


class Post(torch.autograd.Function):
    """``post``: (streams, branch, branch_bias, packed) to the next streams."""

    @staticmethod
    def forward(
        ctx: Any,
        streams: Tensor,
        branch: Tensor,
        branch_bias: Tensor | None,
        packed: Tensor,
        plan: Plan,
    ) -> Tensor:
        ctx.save_for_backward(streams, branch, branch_bias, packed)
        ctx.plan = plan
        return launch.post(plan, streams, branch, branch_bias, packed)

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, grad_streams: Tensor) -> Gradients:
        streams, branch, branch_bias, packed = ctx.saved_tensors
        plan: Plan = ctx.plan
        if not plan.num_tokens:
            return *_zeros(streams, branch, branch_bias, packed), None
        grad_x, grad_branch, grad_packed = backward_launch.streams_backward(
            plan,
            plan.stream(),
            None,
            grad_streams.contiguous(),
            streams,
            branch,
            branch_bias,
            packed,
            None,
            None,
            None,
            None,
        )
        return grad_x, grad_branch, _bias_gradient(grad_branch, branch_bias), grad_packed, None


class Pre(torch.autograd.Function):
    """``pre``: (streams, parameters) to (u, packed, the streams again, 1/RMS of u).

    ``post`` takes the third, so that its gradient of the streams comes here to be added to. With
    ``norm_weight`` u is normalised; without, the last is None. phi's gradient is added to
    ``main_grad``, if there is one.
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
        norm_weight: Tensor | None,
        main_grad: Tensor | None,
        plan: Plan,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        parameters = Parameters(weight, alpha_pre, alpha_post, alpha_res, bias)
        stream = plan.stream()
        factors = launch.factor_weight(plan, stream, weight)
        _, u, raw, packed, inverse_rms = launch.mix(
            plan, stream, streams, None, None, None, factors, parameters, norm_weight
        )
        ctx.save_for_backward(streams, raw, packed, factors, norm_weight, inverse_rms, *parameters)
        _remember(ctx, plan, parameters, main_grad, inverse_rms)
        return u, packed, streams.view_as(streams), inverse_rms

    @staticmethod
    @_once_differentiable
    def backward(
        ctx: Any,
        grad_u: Tensor | None,
        grad_packed: Tensor | None,
        grad_through: Tensor | None,
        grad_inverse_rms: None,
    ) -> Gradients:
        streams, raw, packed, factors, norm_weight, inverse_rms, *rest = ctx.saved_tensors
        parameters, plan = Parameters(*rest), ctx.plan
        if not plan.num_tokens:
            zeros = *_zeros(streams), *_zero_parameters(ctx, parameters), *_zeros(norm_weight)
            return *zeros, None, None
        stream, scratch = plan.stream(), backward_launch.scratch_of(plan)
        grad_u = backward_launch.mix_backward(
            plan,
            stream,
            scratch,
            streams,
            _given(plan, grad_u, streams),
            _contiguous(grad_packed),
            raw,
            packed,
            parameters,
            norm_weight,
            inverse_rms,
        )
        grad_streams, grad_weight = backward_launch.pre_backward(
            plan,
            stream,
            scratch,
            _contiguous(grad_through),
            streams,
            grad_u,
            packed,
            factors,
            parameters.weight if ctx.trains else None,
            ctx.main_grad,
        )
        gradients = _parameter_gradients(
            ctx, stream, scratch, grad_weight, parameters.alpha_res, norm_weight
        )
        return grad_streams, *gradients, None, None


class PostPre(torch.autograd.Function):
    """``post_pre`` and ``single_pass``: (streams, branch, branch_bias, packed, parameters) to
    (next streams, u, packed, 1/RMS of u); the last and ``main_grad`` as for ``pre``."""

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
        norm_weight: Tensor | None,
        main_grad: Tensor | None,
        plan: Plan,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        parameters = Parameters(weight, alpha_pre, alpha_post, alpha_res, bias)
        stream = plan.stream()
        factors = launch.factor_weight(plan, stream, weight)
        new_streams, u, raw, new_packed, inverse_rms = launch.mix(
            plan, stream, streams, branch, branch_bias, packed, factors, parameters, norm_weight
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
        _remember(ctx, plan, parameters, main_grad, inverse_rms)
        return new_streams, u, new_packed, inverse_rms

    @staticmethod
    @_once_differentiable
    def backward(
        ctx: Any,
        grad_streams: Tensor | None,
        grad_u: Tensor | None,
        grad_new_packed: Tensor | None,
        grad_inverse_rms: None,
    ) -> Gradients:
        streams, branch, branch_bias, packed, *rest = ctx.saved_tensors
        new_streams, raw, new_packed, factors, norm_weight, inverse_rms, *rest = rest
        parameters, plan = Parameters(*rest), ctx.plan
        if not plan.num_tokens:
            zeros = (
                *_zeros(streams, branch, branch_bias, packed),
                *_zero_parameters(ctx, parameters),
            )
            return *zeros, *_zeros(norm_weight), None, None
        read_packed = packed if plan.single_pass else new_packed
        stream, scratch = plan.stream(), backward_launch.scratch_of(plan)
        grad_u = backward_launch.mix_backward(
            plan,
            stream,
            scratch,
            new_streams,
            _given(plan, grad_u, new_streams),
            _contiguous(grad_new_packed),
            raw,
            read_packed,
            parameters,
            norm_weight,
            inverse_rms,
        )
        grad_weight = None
        if ctx.trains:
            # Right after the first pass, whose last reads of the streams are still in L2.
            grad_weight = backward_launch.weight_backward(
                plan, stream, scratch, new_streams, parameters.weight, ctx.main_grad
            )
        gradients = _parameter_gradients(
            ctx, stream, scratch, grad_weight, parameters.alpha_res, norm_weight
        )
        grad_x, grad_branch, grad_packed = backward_launch.streams_backward(
            plan,
            stream,
            scratch,
            _contiguous(grad_streams),
            streams,
            branch,
            branch_bias,
            packed,
            new_streams,
            grad_u,
            read_packed,
            factors,
        )
        grad_bias = _bias_gradient(grad_branch, branch_bias)
        return grad_x, grad_branch, grad_bias, grad_packed, *gradients, None, None


def _remember(
    ctx: Any,
    plan: Plan,
    parameters: Parameters,
    main_grad: Tensor | None,
    inverse_rms: Tensor | None,
) -> None:
    """What the backward needs besides tensors: the plan, whether parameters want gradients, and
    where phi's goes.

    ``main_grad`` is not among the saved tensors, which other backward passes must not change.
    """
    weight, alpha_pre, alpha_post, alpha_res, bias = parameters
    ctx.plan, ctx.main_grad = plan, main_grad
    ctx.trains = (
        plan.has_norm
        or weight.requires_grad
        or alpha_pre.requires_grad
        or alpha_post.requires_grad
        or bias.requires_grad
        or (alpha_res is not None and alpha_res.requires_grad)
    )
    ctx.set_materialize_grads(False)
    if inverse_rms is not None:
        ctx.mark_non_differentiable(inverse_rms)


def _given(plan: Plan, grad_u: Tensor | None, streams: Tensor) -> Tensor:
    if grad_u is None:
        return streams.new_zeros(plan.shape_of_input(streams))
    return grad_u.contiguous()


def _contiguous(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.contiguous()


def _parameter_gradients(
    ctx: Any,
    stream: int | None,
    scratch: Tensor,
    grad_weight: Tensor | None,
    alpha_res: Tensor | None,
    norm_weight: Tensor | None,
) -> Gradients:
    """In the order of ``Parameters``, and the norm's weight's; without ``grad_weight`` none."""
    if grad_weight is None:
        return None, None, None, None, None, None
    grad_pre, grad_post, grad_res, grad_bias, grad_norm = backward_launch.parameter_backward(
        ctx.plan, stream, scratch, grad_weight, norm_weight
    )
    return (
        grad_weight if ctx.main_grad is None else None,
        grad_pre,
        grad_post,
        None if alpha_res is None else grad_res,
        grad_bias,
        grad_norm,
    )


def _zero_parameters(ctx: Any, parameters: Parameters) -> Gradients:
    weight, *others = parameters
    return _zeros(weight if ctx.main_grad is None else None, *others)


def _bias_gradient(grad_branch: Tensor, branch_bias: Tensor | None) -> Tensor | None:
    if branch_bias is None:
        return None
    summed = grad_branch.flatten(0, -2).sum(dim=0, dtype=torch.float32)
    return summed.to(branch_bias.dtype)


def _zeros(*tensors: Tensor | None) -> Gradients:
    """The gradients where there is no token."""
    return tuple(None if tensor is None else torch.zeros_like(tensor) for tensor in tensors)
