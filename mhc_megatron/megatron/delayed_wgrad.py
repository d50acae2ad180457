"""Weight gradients that Transformer Engine's modules queue in a backward, for a schedule's W.

Such a module computes the gradients of its input and its weight in one autograd function, which
cannot run in two halves. Built with ``delay_wgrad_compute`` it computes the first alone, keeps what
the second needs in a queue, first in, first out, and computes it in ``backward_dw``. The arithmetic
is the same to the last bit.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mhc_megatron.errors import UserError

# Modules that ``_ignore_buffers`` has seen: every step asks for the queues of its chunks anew.
_IGNORING: WeakSet[nn.Module] = WeakSet()


def delay_weight_gradients(config: TransformerConfig) -> None:
    """Let the Transformer Engine modules that are built from ``config`` queue weight gradients.

    Sets ``delay_wgrad_compute``, which Megatron's own constructor admits only beside a schedule of
    its own. Chunks built so run under ``ForwardBackward``; under Megatron's schedules nobody would
    compute what they queue. ``DistributedDataParallelConfig`` needs ``delay_wgrad_compute`` too.

    Args:
        config: before any module is built from it.

    Raises:
        UserError: an option under which Transformer Engine cannot delay them.
    """
    if config.tp_comm_overlap:
        raise UserError(
            "tp_comm_overlap=True does not combine with delayed weight gradients: Transformer "
            "Engine overlaps its communication with their computation; set it to False, or use a "
            "schedule without W, such as one_f_one_b"
        )
    config.delay_wgrad_compute = True


class QueuedWeightGrads:
    """What the modules of one chunk have queued and not yet computed.

    Args:
        chunk: a model chunk, wrapped or not.
    """

    def __init__(self, chunk: nn.Module) -> None:
        self._modules: list[Any] = [module for module in chunk.modules() if _queues(module)]
        self._taken = [0] * len(self._modules)
        for module in self._modules:
            _ignore_buffers(module)

    def __bool__(self) -> bool:
        """Whether any module of the chunk queues its weight gradients."""
        return bool(self._modules)

    def take(self) -> Callable[[], None]:
        """Take what the backward that has just ended queued.

        Returns:
            What computes it and adds it to the gradients. To be called in the order of the
            backwards.
        """
        counts = []
        for index, module in enumerate(self._modules):
            counts.append(module.wgrad_store.context.qsize() - self._taken[index])
            self._taken[index] += counts[-1]

        def compute() -> None:
            for index, module in enumerate(self._modules):
                _compute(module, counts[index])
                self._taken[index] -= counts[index]

        return compute


def _queues(module: Any) -> bool:
    needs = getattr(module, "need_backward_dw", None)
    return needs is not None and needs()


def _ignore_buffers(module: Any) -> None:
    """Let autograd add nothing for weights that are queued; once per module.

    GroupedLinear (Transformer Engine 2.20) hands autograd the memory into which ``backward_dw``
    will write, with whatever is there. Under Megatron's DDP its hooks look at what ``backward_dw``
    leaves alone; without, autograd would add that memory to the gradients.
    """
    if not hasattr(module, "num_gemms") or module in _IGNORING:
        return
    _IGNORING.add(module)
    hooks = module.wgrad_accumulation_and_reduce_hooks

    def nothing(buffer: Tensor) -> Tensor:
        return buffer if hooks else torch.zeros_like(buffer)

    for name, parameter in module.named_parameters(recurse=False):
        if name.startswith("weight"):
            parameter.register_hook(nothing)


def _compute(module: Any, times: int) -> None:
    """``backward_dw``, which overwrites gradients: what was there before is added again."""
    if module.wgrad_accumulation_and_reduce_hooks:
        # Megatron's DDP: its hooks add the gradient to main_grad and take it away.
        for _ in range(times):
            module.backward_dw()
        return
    parameters = list(module.parameters(recurse=False))
    before = [parameter.grad for parameter in parameters]
    found: list[Tensor | None] = [None] * len(parameters)
    for _ in range(times):
        for parameter in parameters:
            parameter.grad = None
        module.backward_dw()
        found = [_sum(a, p.grad) for a, p in zip(found, parameters, strict=True)]
    for parameter, a, b in zip(parameters, before, found, strict=True):
        parameter.grad = _sum(a, b)


def _sum(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """As autograd accumulates: into the first."""
    if total is None or gradient is None:
        return gradient if total is None else total
    return total.add_(gradient)
