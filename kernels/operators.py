"""The Triton kernels as operators of torch.library, for torch.compile, torch.export and FakeTensor.

Eager calls take functions.py, which costs the host less; both run the passes of passes.py. Traced,
the default tiles are used, and ``post`` leaves the sum of the streams' gradients to the compiler.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mhc_megatron.kernels.options import MappingOptions
from mhc_megatron.kernels.triton.arguments import parts_of
from mhc_megatron.kernels.triton.buffers import shape_of_factors
from mhc_megatron.kernels.triton.passes import POST, POST_PRE, PRE
from mhc_megatron.kernels.triton.plan import plan_of

# Of MappingOptions: an operator takes only numbers, strings and tensors.
Constants = tuple[str, int, float, float]


def constants_of(options: MappingOptions) -> Constants:
    return options.projection, options.iterations, options.eps, options.rms_eps


def _options(projection: str, iterations: int, eps: float, rms_eps: float) -> MappingOptions:
    return MappingOptions(projection=projection, iterations=iterations, eps=eps, rms_eps=rms_eps)


def _own(factors: Tensor, weight: Tensor) -> Tensor:
    """phi's factors as a result of an operator, which must not be one of its arguments."""
    return weight.new_empty(0) if factors is weight else factors


def _factors(own: Tensor, weight: Tensor) -> Tensor:
    return own if own.numel() else weight


def _given(gradient: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if gradient is None else gradient


def _found(gradients: Iterable[Tensor | None]) -> list[Tensor]:
    return [gradient for gradient in gradients if gradient is not None]


def _sizes(streams: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """T, n * (n + 2) and M."""
    n, channels = streams.shape[-2:]
    return streams.numel() // (n * channels), n * (n + 2), weight.shape[0]


@torch.library.custom_op("mhc_megatron::post", mutates_args=())
def post(streams: Tensor, branch: Tensor, branch_bias: Tensor | None, packed: Tensor) -> Tensor:
    """The next streams."""
    plan = plan_of(streams, branch, branch_bias)
    results, _ = POST.forward(plan, plan.stream(), streams, branch, branch_bias, packed)
    return _found(results)[0]


@post.register_fake
def _(streams: Tensor, branch: Tensor, branch_bias: Tensor | None, packed: Tensor) -> Tensor:
    return torch.empty_like(streams)


@torch.library.custom_op("mhc_megatron::post_backward", mutates_args=())
def post_backward(
    grad: Tensor, streams: Tensor, branch: Tensor, branch_bias: Tensor | None, packed: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of streams, branch, branch_bias (empty without) and packed."""
    plan = plan_of(streams, branch, branch_bias)
    saved = (streams, branch, branch_bias, packed)
    grad_x, grad_branch, grad_bias, grad_packed = POST.gradients(plan, saved, (grad,))
    grads = _found((grad_x, grad_branch, _given(grad_bias, branch), grad_packed))
    return grads[0], grads[1], grads[2], grads[3]


@post_backward.register_fake
def _(
    grad: Tensor, streams: Tensor, branch: Tensor, branch_bias: Tensor | None, packed: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias = branch.new_empty(0) if branch_bias is None else torch.empty_like(branch_bias)
    return torch.empty_like(streams), torch.empty_like(branch), bias, torch.empty_like(packed)


def _save_post(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _post_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grad_x, grad_branch, grad_bias, grad_packed = post_backward(grad, *saved)
    return grad_x, grad_branch, None if saved[2] is None else grad_bias, grad_packed


post.register_autograd(_post_gradients, setup_context=_save_post)


@torch.library.custom_op("mhc_megatron::pre", mutates_args=())
def pre(
    streams: Tensor,
    weight: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor | None,
    bias: Tensor,
    norm_weight: Tensor | None,
    projection: str,
    iterations: int,
    eps: float,
    rms_eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u and packed; raw logits, phi's factors and u's 1/RMS (empty without) for the backward."""
    options = _options(projection, iterations, eps, rms_eps)
    plan = plan_of(streams, norm_weight=norm_weight, options=options, norm_eps=norm_eps)
    parameters = (weight, alpha_pre, alpha_post, alpha_res, bias)
    results, kept = PRE.forward(plan, plan.stream(), streams, *parameters, norm_weight)
    u, packed, raw, factors = _found((*results[:2], *kept[1:3]))
    return u, packed, raw, _own(factors, weight), _given(results[3], weight)


@pre.register_fake
def _(
    streams: Tensor,
    weight: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor | None,
    bias: Tensor,
    norm_weight: Tensor | None,
    projection: str,
    iterations: int,
    eps: float,
    rms_eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _fake_read(streams, weight, norm_weight)


def _fake_read(
    streams: Tensor, weight: Tensor, norm_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, rows, num_logits = _sizes(streams, weight)
    factors = weight.new_empty(0)
    if parts_of(streams.dtype) == 2:
        n, channels = streams.shape[-2:]
        shape = shape_of_factors(n, num_logits, channels)
        factors = weight.new_empty(shape, dtype=torch.bfloat16)
    return (
        streams.new_empty((*streams.shape[:-2], streams.shape[-1])),
        weight.new_empty((rows, tokens)),
        weight.new_empty((num_logits + 1, tokens)),
        factors,
        weight.new_empty((0 if norm_weight is None else tokens,)),
    )


@torch.library.custom_op("mhc_megatron::pre_backward", mutates_args=())
def pre_backward(
    grad_u: Tensor,
    grad_packed: Tensor,
    streams: Tensor,
    raw: Tensor,
    packed: Tensor,
    factors: Tensor,
    inverse_rms: Tensor,
    weight: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor | None,
    bias: Tensor,
    norm_weight: Tensor | None,
    projection: str,
    iterations: int,
    eps: float,
    rms_eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of streams, weight, the alphas in one tensor, bias, norm_weight (empty without)."""
    parameters = (weight, alpha_pre, alpha_post, alpha_res, bias, norm_weight)
    kept = (packed, raw, _factors(factors, weight), inverse_rms)
    options = _options(projection, iterations, eps, rms_eps)
    plan = plan_of(streams, norm_weight=norm_weight, options=options, norm_eps=norm_eps)
    saved = (streams, *parameters, *kept)
    found = PRE.gradients(plan, saved, (grad_u, grad_packed, None, None))
    grad_norm = _given(found[6], weight)
    grad_x, grad_weight, *alphas, grad_bias = _found(found[:6])
    return grad_x, grad_weight, torch.cat(alphas), grad_bias, grad_norm


@pre_backward.register_fake
def _(
    grad_u: Tensor,
    grad_packed: Tensor,
    streams: Tensor,
    raw: Tensor,
    packed: Tensor,
    factors: Tensor,
    inverse_rms: Tensor,
    weight: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor | None,
    bias: Tensor,
    norm_weight: Tensor | None,
    projection: str,
    iterations: int,
    eps: float,
    rms_eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (torch.empty_like(streams), *_fake_parameters(weight, alpha_res, bias, norm_weight))


def _fake_parameters(
    weight: Tensor, alpha_res: Tensor | None, bias: Tensor, norm_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    alphas = bias.new_empty((2 if alpha_res is None else 3,))
    norm = weight.new_empty(0) if norm_weight is None else torch.empty_like(norm_weight)
    return torch.empty_like(weight), alphas, torch.empty_like(bias), norm


def _save_pre(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    streams, *parameters = inputs[:7]
    _, packed, raw, factors, inverse_rms = output
    ctx.save_for_backward(streams, raw, packed, factors, inverse_rms, *parameters)
    ctx.constants = inputs[7:]
    ctx.mark_non_differentiable(raw, factors, inverse_rms)


def _pre_gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grad_x, *rest = pre_backward(grads[0], grads[1], *saved, *ctx.constants)
    return grad_x, *_parameters(rest, has_norm=saved[-1] is not None), *[None] * 5


def _parameters(gradients: list[Tensor], *, has_norm: bool) -> tuple[Tensor | None, ...]:
    """weight, alpha_pre, alpha_post, alpha_res, bias and norm_weight."""
    grad_weight, alphas, grad_bias, grad_norm = gradients
    grad_res = alphas[2:3] if alphas.shape[0] == 3 else None
    norm = grad_norm if has_norm else None
    return grad_weight, alphas[0:1], alphas[1:2], grad_res, grad_bias, norm


pre.register_autograd(_pre_gradients, setup_context=_save_pre)


@torch.library.custom_op("mhc_megatron::post_pre", mutates_args=())
def post_pre(
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
    projection: str,
    iterations: int,
    eps: float,
    rms_eps: float,
    norm_eps: float,
    single_pass: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The next streams, u and packed; raw logits, phi's factors and u's 1/RMS as for ``pre``."""
    plan = plan_of(
        streams,
        branch,
        branch_bias,
        norm_weight,
        options=_options(projection, iterations, eps, rms_eps),
        single_pass=single_pass,
        norm_eps=norm_eps,
    )
    state = (streams, branch, branch_bias, packed)
    parameters = (weight, alpha_pre, alpha_post, alpha_res, bias)
    results, kept = POST_PRE.forward(plan, plan.stream(), *state, *parameters, norm_weight)
    new_streams, u, new_packed, raw, factors = _found((*results[:3], *kept[2:4]))
    norm = _given(results[3], weight)
    return new_streams, u, new_packed, raw, _own(factors, weight), norm


@post_pre.register_fake
def _(
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
    projection: str,
    iterations: int,
    eps: float,
    rms_eps: float,
    norm_eps: float,
    single_pass: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (torch.empty_like(streams), *_fake_read(streams, weight, norm_weight))


@torch.library.custom_op("mhc_megatron::post_pre_backward", mutates_args=())
def post_pre_backward(
    grad_streams: Tensor,
    grad_u: Tensor,
    grad_new_packed: Tensor,
    streams: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    packed: Tensor,
    new_streams: Tensor,
    raw: Tensor,
    new_packed: Tensor,
    factors: Tensor,
    inverse_rms: Tensor,
    weight: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor | None,
    bias: Tensor,
    norm_weight: Tensor | None,
    projection: str,
    iterations: int,
    eps: float,
    rms_eps: float,
    norm_eps: float,
    single_pass: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of streams, branch, branch_bias and packed, then as of ``pre_backward``.

    Those of branch_bias and norm_weight are empty without them.
    """
    state = (streams, branch, branch_bias, packed)
    parameters = (weight, alpha_pre, alpha_post, alpha_res, bias, norm_weight)
    kept = (new_streams, new_packed, raw, _factors(factors, weight), inverse_rms)
    plan = plan_of(
        streams,
        branch,
        branch_bias,
        norm_weight,
        options=_options(projection, iterations, eps, rms_eps),
        single_pass=single_pass,
        norm_eps=norm_eps,
    )
    grads = (grad_streams, grad_u, grad_new_packed, None)
    found = POST_PRE.gradients(plan, (*state, *parameters, *kept), grads)
    bias_given, norm_given = _given(found[2], branch), _given(found[9], weight)
    grad_x, grad_branch, grad_packed, *rest = _found((*found[:2], *found[3:9]))
    grad_weight, *alphas, grad_bias = rest
    parameter_grads = (grad_weight, torch.cat(alphas), grad_bias, norm_given)
    return grad_x, grad_branch, bias_given, grad_packed, *parameter_grads


@post_pre_backward.register_fake
def _(
    grad_streams: Tensor,
    grad_u: Tensor,
    grad_new_packed: Tensor,
    streams: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    packed: Tensor,
    new_streams: Tensor,
    raw: Tensor,
    new_packed: Tensor,
    factors: Tensor,
    inverse_rms: Tensor,
    weight: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor | None,
    bias: Tensor,
    norm_weight: Tensor | None,
    projection: str,
    iterations: int,
    eps: float,
    rms_eps: float,
    norm_eps: float,
    single_pass: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    branch_grad = branch.new_empty(0) if branch_bias is None else torch.empty_like(branch_bias)
    return (
        torch.empty_like(streams),
        torch.empty_like(branch),
        branch_grad,
        torch.empty_like(packed),
        *_fake_parameters(weight, alpha_res, bias, norm_weight),
    )


def _save_post_pre(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    new_streams, _, new_packed, raw, factors, inverse_rms = output
    made = (new_streams, raw, new_packed, factors, inverse_rms)
    ctx.save_for_backward(*inputs[:4], *made, *inputs[4:10])
    ctx.constants = inputs[10:]
    ctx.mark_non_differentiable(raw, factors, inverse_rms)


def _post_pre_gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    found = post_pre_backward(*grads[:3], *saved, *ctx.constants)
    grad_x, grad_branch, grad_branch_bias, grad_packed, *rest = found
    if saved[2] is None:
        grad_branch_bias = None
    states = (grad_x, grad_branch, grad_branch_bias, grad_packed)
    return *states, *_parameters(rest, has_norm=saved[-1] is not None), *[None] * 6


post_pre.register_autograd(_post_pre_gradients, setup_context=_save_post_pre)
