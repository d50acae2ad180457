"""Megatron's contract for a gradient that a backward adds to ``main_grad`` by itself."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mhc_megatron.errors import UserError


def main_grad_of(weight: nn.Parameter) -> Tensor | None:
    """The buffer in which Megatron's DDP collects the gradient of ``weight``; None without DDP.

    Raises:
        UserError: Megatron-FSDP owns the parameter.
    """
    if hasattr(weight, "__fsdp_param__"):
        raise UserError(
            "gradient_accumulation_fusion=True does not combine with hyper-connections under "
            "Megatron-FSDP: it makes main_grad anew for every backward; set it to False"
        )
    return getattr(weight, "main_grad", None)


class AddedToMainGrad(torch.autograd.Function):
    """The weight itself; backward says that its gradient is in ``main_grad`` already.

    As ``LinearWithGradAccumulationAndAsyncCommunication`` in megatron-core's
    tensor_parallel/layers.py: DDP's hooks expect a gradient, which they drop where
    ``grad_added_to_main_grad`` is set, and add where ``zero_out_wgrad`` is.
    """

    @staticmethod
    def forward(ctx: Any, weight: nn.Parameter) -> Tensor:
        ctx.weight = weight
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        weight = ctx.weight
        if grad is not None:  # of another reader than the kernels
            weight.main_grad.add_(grad)
        if not hasattr(weight, "grad_added_to_main_grad"):
            return None
        weight.grad_added_to_main_grad = True
        if getattr(weight, "zero_out_wgrad", False):
            return torch.zeros_like(weight)
        return torch.empty_like(weight)
