"""``expand`` and the contractions as Triton kernels under autograd; see functions.py.

``expand`` and the plain contractions keep nothing for backward; the learned one the streams, which
the graph holds anyway, and n + 1 float32 numbers per token.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhc_megatron.kernels.triton import head_launch
from mhc_megatron.kernels.triton.head_launch import HeadParameters
from mhc_megatron.kernels.triton.head_tiles import HeadTiles


class Expand(torch.autograd.Function):
    """``expand``: hidden to streams."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, num_streams: int, tiles: HeadTiles) -> Tensor:
        ctx.tile = tiles.copies
        return head_launch.expand(hidden, num_streams, divisor=1, tile=tiles.copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return head_launch.contract(grad.contiguous(), divisor=1, tile=ctx.tile), None, None


class Contract(torch.autograd.Function):
    """``contract_mean`` (the divisor is n) and ``contract_sum`` (1): streams to hidden."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, divisor: int, tiles: HeadTiles) -> Tensor:
        ctx.num_streams, ctx.divisor, ctx.tile = streams.shape[-2], divisor, tiles.copies
        return head_launch.contract(streams, divisor=divisor, tile=tiles.copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_streams = head_launch.expand(
            grad.contiguous(), ctx.num_streams, divisor=ctx.divisor, tile=ctx.tile
        )
        return grad_streams, None, None


class ContractLearned(torch.autograd.Function):
    """``contract_learned``: (streams, weight, scale, bias) to hidden."""

    @staticmethod
    def forward(
        ctx: Any,
        streams: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor,
        rms_eps: float,
        eps: float,
        tiles: HeadTiles,
    ) -> Tensor:
        parameters = HeadParameters(weight, scale, bias)
        hidden, raw = head_launch.contract_learned(
            streams, parameters, rms_eps=rms_eps, eps=eps, tile=tiles.learned
        )
        ctx.save_for_backward(streams, raw, *parameters)
        ctx.eps, ctx.tiles = eps, tiles
        ctx.trains = any(parameter.requires_grad for parameter in parameters)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        streams, raw, *rest = ctx.saved_tensors
        parameters = HeadParameters(*rest)
        if streams.numel() == 0:
            return *(torch.zeros_like(given) for given in (streams, *parameters)), None, None, None
        grad_streams, grads = head_launch.contract_learned_backward(
            grad.contiguous(),
            streams,
            raw,
            parameters,
            eps=ctx.eps,
            trains=ctx.trains,
            tiles=ctx.tiles,
        )
        return grad_streams, *(grads or (None, None, None)), None, None, None
