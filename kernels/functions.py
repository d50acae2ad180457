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

from mhc_megatron.kernels.native.programs import Programs
from mhc_megatron.kernels.triton.passes import POST, POST_PRE, PRE, Operation, Tensors
from mhc_megatron.kernels.triton.plan import UNDECIDED, Plan


def post(plan: Plan, *operands: Tensor | None) -> Tensor:
    """(streams, branch, branch_bias, packed) to the next streams."""
    new_streams: Tensor = _run(POST, plan, None, operands)[0]
    return new_streams


def pre(
    plan: Plan, main_grad: Tensor | None, *operands: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(streams, weight, alphas, bias, norm_weight) to (u, packed, the streams again, 1/RMS of u).

    ``post`` takes the third, so that its gradient of the streams comes here to be added to. With
    ``norm_weight`` u is normalised; without, the last is None. phi's gradient is added to
    ``main_grad``, if there is one.
    """
    u, packed, through, inverse_rms = _run(PRE, plan, main_grad, operands)
    return u, packed, through, inverse_rms


def post_pre(
    plan: Plan, main_grad: Tensor | None, *operands: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``post_pre`` and ``single_pass``: (streams, branch, branch_bias, packed, weight, alphas,
    bias, norm_weight) to (next streams, u, packed, 1/RMS of u); the last and ``main_grad`` as for
    ``pre``."""
    new_streams, u, packed, inverse_rms = _run(POST_PRE, plan, main_grad, operands)
    return new_streams, u, packed, inverse_rms


def _run(operation: Operation, plan: Plan, main_grad: Tensor | None, operands: Tensors) -> Any:
    """Replayed, where that was learnt; else by Python, which is learnt from."""
    if plan.programs is UNDECIDED:
        plan.programs = Programs.of(operation, plan)
    programs = plan.programs
    if programs is None:
        return Fused.apply(operation, plan, main_grad, *operands)
    results = programs.run(operands, main_grad)
    if results is None:
        results = Fused.apply(operation, plan, main_grad, *operands)
        programs.learn(operands)
    return results


def _once_differentiable(backward: Callable[..., Tensors]) -> Callable[..., Tensors]:
    """torch's, whose cost is paid only where a graph of the backward is asked for."""
    guarded = once_differentiable(backward)

    @wraps(backward)
    def either(ctx: Any, *grads: Tensor | None) -> Tensors:
        gradients: Tensors = (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)
        return gradients

    return either


class Fused(torch.autograd.Function):
    """An operation of passes.py: its operands to its results."""

    @staticmethod
    def forward(
        ctx: Any,
        operation: Operation,
        plan: Plan,
        main_grad: Tensor | None,
        *operands: Tensor | None,
    ) -> Tensors:
        results, kept = operation.forward(plan, plan.stream(), *operands)
        ctx.save_for_backward(*operands, *kept)
        # Not among the saved tensors, which other backward passes must not change.
        ctx.main_grad = main_grad
        ctx.operation, ctx.plan = operation, plan
        ctx.trains = operation.trains(operands)
        ctx.set_materialize_grads(False)
        if operation.unused is not None and (unused := results[operation.unused]) is not None:
            ctx.mark_non_differentiable(unused)
        return results

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Tensors:
        gradients = ctx.operation.gradients(
            ctx.plan, ctx.saved_tensors, grads, ctx.trains, ctx.main_grad
        )
        return None, None, None, *gradients
