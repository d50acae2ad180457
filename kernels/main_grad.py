"""phi's gradient added to a buffer of the caller's instead of returned, of the reference."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _AddGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, main_grad: Tensor) -> Tensor:
        ctx.main_grad = main_grad
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        ctx.main_grad.add_(grad)
        return None, None


def add_gradient_to(weight: Tensor, main_grad: Tensor | None) -> Tensor:
    """``weight``, whose gradient is added to ``main_grad``; without one it is returned as ever.

    Args:
        weight: [M, n*C].
        main_grad: [M, n*C] float32, or None.
    """
    return weight if main_grad is None else _AddGradient.apply(weight, main_grad)
