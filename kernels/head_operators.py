"""``expand`` and the contractions as operators of torch.library; see operators.py."""

from typing import Any

import torch
from torch import Tensor

from mhc_megatron.kernels.triton import head_launch
from mhc_megatron.kernels.triton.head_launch import HeadParameters
from mhc_megatron.kernels.triton.head_tiles import default_head_tiles


@torch.library.custom_op("mhc_megatron::expand", mutates_args=())
def expand(hidden: Tensor, num_streams: int, divisor: int) -> Tensor:
    """n copies of ``hidden / divisor``."""
    tile = default_head_tiles(num_streams, hidden.dtype).copies
    return head_launch.expand(hidden.contiguous(), num_streams, divisor=divisor, tile=tile)


@expand.register_fake
def _(hidden: Tensor, num_streams: int, divisor: int) -> Tensor:
    return hidden.new_empty((*hidden.shape[:-1], num_streams, hidden.shape[-1]))


@torch.library.custom_op("mhc_megatron::contract", mutates_args=())
def contract(streams: Tensor, divisor: int) -> Tensor:
    """The sum of the streams over ``divisor``."""
    tile = default_head_tiles(streams.shape[-2], streams.dtype).copies
    return head_launch.contract(streams.contiguous(), divisor=divisor, tile=tile)


@contract.register_fake
def _(streams: Tensor, divisor: int) -> Tensor:
    return streams.new_empty((*streams.shape[:-2], streams.shape[-1]))


def _save_expand(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
    ctx.divisor = inputs[2]


def _expand_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return contract(grad, ctx.divisor), None, None


def _save_contract(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.num_streams, ctx.divisor = inputs[0].shape[-2], inputs[1]


def _contract_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return expand(grad, ctx.num_streams, ctx.divisor), None


expand.register_autograd(_expand_gradients, setup_context=_save_expand)
contract.register_autograd(_contract_gradients, setup_context=_save_contract)


@torch.library.custom_op("mhc_megatron::contract_learned", mutates_args=())
def contract_learned(
    streams: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, rms_eps: float, eps: float
) -> tuple[Tensor, Tensor]:
    """The weighted sum; raw numbers for the backward."""
    tile = default_head_tiles(streams.shape[-2], streams.dtype).learned
    parameters = HeadParameters(weight, scale, bias)
    return head_launch.contract_learned(streams, parameters, rms_eps=rms_eps, eps=eps, tile=tile)


@contract_learned.register_fake
def _(
    streams: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, rms_eps: float, eps: float
) -> tuple[Tensor, Tensor]:
    *tokens, n, channels = streams.shape
    raw = weight.new_empty((n + 1, streams.numel() // (n * channels)))
    return streams.new_empty((*tokens, channels)), raw


@torch.library.custom_op("mhc_megatron::contract_learned_backward", mutates_args=())
def contract_learned_backward(
    grad: Tensor,
    streams: Tensor,
    raw: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of streams, weight, scale and bias."""
    parameters = HeadParameters(weight, scale, bias)
    if streams.numel() == 0:
        grads = HeadParameters(*map(torch.zeros_like, parameters))
        return torch.zeros_like(streams), *grads
    grad_streams, found = head_launch.contract_learned_backward(
        grad.contiguous(),
        streams,
        raw,
        parameters,
        eps=eps,
        trains=True,
        tiles=default_head_tiles(streams.shape[-2], streams.dtype),
    )
    assert found is not None
    return grad_streams, *found


@contract_learned_backward.register_fake
def _(
    grad: Tensor,
    streams: Tensor,
    raw: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parameters = (torch.empty_like(weight), torch.empty_like(scale), torch.empty_like(bias))
    return torch.empty_like(streams), *parameters


def _save_learned(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    streams, *parameters = inputs[:4]
    _, raw = output
    ctx.save_for_backward(streams, raw, *parameters)
    ctx.eps = inputs[5]
    ctx.mark_non_differentiable(raw)


def _learned_gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *contract_learned_backward(grad, *ctx.saved_tensors, ctx.eps), None, None


contract_learned.register_autograd(_learned_gradients, setup_context=_save_learned)
