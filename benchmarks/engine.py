"""Gradients by autograd's engine itself, as Megatron's schedules call it."""

from collections.abc import Sequence

from torch import Tensor
from torch.autograd import Variable


def gradients(
    outputs: Sequence[Tensor],
    leaves: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    retain_graph: bool = False,
) -> tuple[Tensor, ...]:
    """``torch.autograd.grad``, without its look at every gradient that is given.

    That is Python, takes longer than the backward of a boundary, and is paid once per step: within
    one, the gradients of a sublayer come from the next. Megatron's ``custom_backward`` goes without
    it as well.
    """
    found: tuple[Tensor, ...] = Variable._execution_engine.run_backward(
        tuple(outputs),
        tuple(grads),
        retain_graph,
        False,  # create_graph
        tuple(leaves),
        allow_unreachable=False,
        accumulate_grad=False,
    )
    return found
