"""The Triton kernels as operators of torch.library, for torch.compile, torch.export and FakeTensor.

Eager calls take functions.py, which costs the host less; both run the same code. Traced, the
default tiles are used, and ``post`` leaves the sum of the streams' gradients to the compiler.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mhc_megatron.kernels.functions import Post, PostPre, Pre
from mhc_megatron.kernels.options import MappingOptions
from mhc_megatron.kernels.triton.arguments import parts_of
from mhc_megatron.kernels.triton.tiles import default_tiles

# Of MappingOptions: an operator takes only numbers, strings and tensors.
Constants = tuple[str, int, float, float]


class _Context:
    """What functions.py asks of autograd's context."""

    def __init__(
        self, streams: Tensor, options: MappingOptions | None = None, **known: Any
    ) -> None:
        self.tiles = default_tiles(*streams.shape[-2:], streams.dtype)
        self.options = options
        self.trains = True
        self.saved_tensors: tuple[Tensor | None, ...] = ()
        self.__dict__.update(known)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        pass


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
    context = _Context(streams)
    return Post.forward(context, streams, branch, branch_bias, packed, context.tiles)


@post.register_fake
def _(streams: Tensor, branch: Tensor, branch_bias: Tensor | None, packed: Tensor) -> Tensor:
    return torch.empty_like(streams)


@torch.library.custom_op("mhc_megatron::post_backward", mutates_args=())
def post_backward(
    grad: Tensor, streams: Tensor, branch: Tensor, branch_bias: Tensor | None, packed: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of streams, branch, branch_bias (empty without) and packed."""
    context = _Context(streams, saved_tensors=(streams, branch, branch_bias, packed))
    grad_x, grad_branch, grad_bias, grad_packed, _ = Post.backward(context, grad)
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
    projection: str,
    iterations: int,
    eps: float,
    rms_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u and packed; raw logits and phi's factors for the backward."""
    options = _options(projection, iterations, eps, rms_eps)
    context = _Context(streams)
    parameters = (weight, alpha_pre, alpha_post, alpha_res, bias)
    u, packed, _ = Pre.forward(context, streams, *parameters, options, context.tiles)
    raw, factors = _found((context.saved_tensors[1], context.saved_tensors[3]))
    return u, packed, raw, _own(factors, weight)


@pre.register_fake
def _(
    streams: Tensor,
    weight: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor | None,
    bias: Tensor,
    projection: str,
    iterations: int,
    eps: float,
    rms_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_read(streams, weight)


def _fake_read(streams: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, rows, num_logits = _sizes(streams, weight)
    factors = weight.new_empty(0)
    if parts_of(streams.dtype) == 2:
        factors = weight.new_empty((2, *weight.shape), dtype=torch.bfloat16)
    return (
        streams.new_empty((*streams.shape[:-2], streams.shape[-1])),
        weight.new_empty((rows, tokens)),
        weight.new_empty((num_logits + 1, tokens)),
        factors,
    )


@torch.library.custom_op("mhc_megatron::pre_backward", mutates_args=())
def pre_backward(
    grad_u: Tensor,
    grad_packed: Tensor,
    streams: Tensor,
    raw: Tensor,
    packed: Tensor,
    factors: Tensor,
    weight: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor | None,
    bias: Tensor,
    projection: str,
    iterations: int,
    eps: float,
    rms_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of streams, weight, the alphas in one tensor, and bias."""
    parameters = (weight, alpha_pre, alpha_post, alpha_res, bias)
    saved = (streams, raw, packed, _factors(factors, weight), *parameters)
    options = _options(projection, iterations, eps, rms_eps)
    context = _Context(streams, options, saved_tensors=saved)
    grad_x, grad_weight, *alphas, grad_bias = _found(
        Pre.backward(context, grad_u, grad_packed, None)
    )
    return grad_x, grad_weight, torch.cat(alphas), grad_bias


@pre_backward.register_fake
def _(
    grad_u: Tensor,
    grad_packed: Tensor,
    streams: Tensor,
    raw: Tensor,
    packed: Tensor,
    factors: Tensor,
    weight: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor | None,
    bias: Tensor,
    projection: str,
    iterations: int,
    eps: float,
    rms_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (torch.empty_like(streams), *_fake_parameters(weight, alpha_res, bias))


def _fake_parameters(
    weight: Tensor, alpha_res: Tensor | None, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gates = 2 if alpha_res is None else 3
    return torch.empty_like(weight), bias.new_empty((gates,)), torch.empty_like(bias)


def _save_pre(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    streams, *parameters = inputs[:6]
    _, packed, raw, factors = output
    ctx.save_for_backward(streams, raw, packed, factors, *parameters)
    ctx.constants = inputs[6:]
    ctx.mark_non_differentiable(raw, factors)


def _pre_gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, *rest = pre_backward(grads[0], grads[1], *ctx.saved_tensors, *ctx.constants)
    return grad_x, *_parameters(rest), None, None, None, None


def _parameters(gradients: list[Tensor]) -> tuple[Tensor | None, ...]:
    """weight, alpha_pre, alpha_post, alpha_res and bias."""
    grad_weight, alphas, grad_bias = gradients
    grad_res = alphas[2:3] if alphas.shape[0] == 3 else None
    return grad_weight, alphas[0:1], alphas[1:2], grad_res, grad_bias


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
    projection: str,
    iterations: int,
    eps: float,
    rms_eps: float,
    single_pass: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The next streams, u and packed; raw logits and phi's factors for the backward."""
    options = _options(projection, iterations, eps, rms_eps)
    context = _Context(streams)
    new_streams, u, new_packed = PostPre.forward(
        context,
        streams,
        branch,
        branch_bias,
        packed,
        weight,
        alpha_pre,
        alpha_post,
        alpha_res,
        bias,
        options,
        single_pass,
        context.tiles,
    )
    raw, factors = _found((context.saved_tensors[5], context.saved_tensors[7]))
    return new_streams, u, new_packed, raw, _own(factors, weight)


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
    projection: str,
    iterations: int,
    eps: float,
    rms_eps: float,
    single_pass: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (torch.empty_like(streams), *_fake_read(streams, weight))


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
    weight: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor | None,
    bias: Tensor,
    projection: str,
    iterations: int,
    eps: float,
    rms_eps: float,
    single_pass: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of streams, branch, branch_bias (empty without), packed, weight, alphas, bias."""
    saved = (streams, branch, branch_bias, packed, new_streams, raw, new_packed)
    parameters = (weight, alpha_pre, alpha_post, alpha_res, bias)
    options = _options(projection, iterations, eps, rms_eps)
    context = _Context(
        streams,
        options,
        saved_tensors=(*saved, _factors(factors, weight), *parameters),
        single_pass=single_pass,
    )
    found = PostPre.backward(context, grad_streams, grad_u, grad_new_packed)
    grad_branch_bias = _given(found[2], branch)
    grads = _found((*found[:2], grad_branch_bias, *found[3:]))
    grad_x, grad_branch, _, grad_packed, grad_weight, *alphas, grad_bias = grads
    alphas_grad = torch.cat(alphas)
    return grad_x, grad_branch, grad_branch_bias, grad_packed, grad_weight, alphas_grad, grad_bias


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
    weight: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor | None,
    bias: Tensor,
    projection: str,
    iterations: int,
    eps: float,
    rms_eps: float,
    single_pass: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    branch_grad = branch.new_empty(0) if branch_bias is None else torch.empty_like(branch_bias)
    return (
        torch.empty_like(streams),
        torch.empty_like(branch),
        branch_grad,
        torch.empty_like(packed),
        *_fake_parameters(weight, alpha_res, bias),
    )


def _save_post_pre(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    new_streams, _, new_packed, raw, factors = output
    ctx.save_for_backward(*inputs[:4], new_streams, raw, new_packed, factors, *inputs[4:9])
    ctx.constants = inputs[9:]
    ctx.mark_non_differentiable(raw, factors)


def _post_pre_gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    found = post_pre_backward(*grads[:3], *ctx.saved_tensors, *ctx.constants)
    grad_x, grad_branch, grad_branch_bias, grad_packed, *rest = found
    if ctx.saved_tensors[2] is None:
        grad_branch_bias = None
    return (grad_x, grad_branch, grad_branch_bias, grad_packed, *_parameters(rest), *[None] * 5)


post_pre.register_autograd(_post_pre_gradients, setup_context=_save_post_pre)
