"""Weight gradients of megatron-core's own linear layers, apart from their input's gradient.

Their autograd function computes both at once, which leaves a schedule with split backwards nothing
to postpone. Megatron also has a function for frozen weights; with it, and the weight's own path
through the graph beside it, the two are separate nodes with the same arithmetic. Transformer
Engine's modules are left as they are.
"""

import logging
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

_LOGGER = logging.getLogger(__name__)


class _WeightPath(torch.autograd.Function):
    """Stands for the product in the weight's graph; has its shape, and no memory."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(x)
        return weight.new_empty(1).expand(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        # As LinearWithGradAccumulationAndAsyncCommunication: grad_output.t().matmul(total_input)
        return grad.flatten(0, -2).t().matmul(x.flatten(0, -2)), None, None


class _Join(torch.autograd.Function):
    """The output, with the weight's path joined to its graph."""

    separable = True  # for mhc_megatron.pipeline.weight_grads

    @staticmethod
    def forward(ctx: Any, output: Tensor, path: Tensor) -> Tensor:
        return output.detach()  # not a view, which the loss could not change in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


def split_linears(chunk: nn.Module) -> None:
    """Let every linear layer in ``chunk`` compute its weight gradient in a node of its own.

    The sums are the same to the last bit. Left as they are, with the weight gradient computed
    beside the input's: layers with a bias inside the product, a gathered output, fused gradient
    accumulation, or sequence parallelism, where either gradient needs the gathered sequence and the
    layer gathers it (``take_collectives``).
    """
    whole = []
    for name, module in chunk.named_modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            if splits(module):
                split_linear(module)
            else:
                whole.append(name)
    if whole:
        _LOGGER.info("weight gradients computed beside the input's: %s", ", ".join(whole))


def split_linear(module: nn.Module) -> None:
    """``split_linears`` of one layer that ``splits``; once."""
    module.register_forward_pre_hook(_freeze)
    module.register_forward_hook(_join, with_kwargs=True, always_call=True)


def splits(module: Any) -> bool:
    """Whether megatron-core's function for frozen weights does what the layer does otherwise."""
    if module.weight is None or module.gradient_accumulation_fusion:
        return False
    alone = module.tp_group is None or module.tp_group.size() == 1
    if not alone and module.sequence_parallel and not module.explicit_expert_comm:
        return False
    if isinstance(module, RowParallelLinear):
        return module.input_is_parallel
    in_product = module.bias is not None and not module.skip_bias_add
    return not in_product and (alone or not module.gather_output)


def _freeze(module: Any, args: tuple) -> None:
    module.weight.requires_grad_(False)


def _join(
    module: Any, args: tuple, kwargs: dict[str, Any], result: tuple[Tensor, Tensor | None]
) -> Any:
    module.weight.requires_grad_(True)
    if result is None or not torch.is_grad_enabled() or kwargs.get("weight") is not None:
        return result
    x = args[0] if args else kwargs["input_"]
    output, bias = result
    path = _WeightPath.apply(module.weight, x.detach(), output.shape)
    return _Join.apply(output, path), bias
