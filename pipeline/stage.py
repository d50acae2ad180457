"""What the executor asks of a stage, and a stage whose backward is autograd's."""

import logging
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mhc_megatron.pipeline.weight_grads import WeightGrads

_LOGGER = logging.getLogger(__name__)


class Stage(Protocol):
    """One stage on one rank. It keeps what a micro-batch needs from its forward on."""

    def forward(self, mb: int, x: Tensor | None) -> Tensor:
        """F: the message to the next stage, or the last stage's output; ``x`` is None at first."""
        ...

    def backward(self, mb: int, grad: Tensor | None, *, defer_weights: bool) -> Tensor | None:
        """B, or with ``defer_weights`` I: the gradient of ``x``; ``grad`` is None at the loss."""
        ...

    def weights(self, mb: int) -> None:
        """W: the weight gradients that ``backward`` left."""
        ...

    def recompute(self, mb: int) -> None:
        """R: rebuild what the forward dropped; ``backward`` does it where this was not called."""
        ...

    @property
    def unfinished(self) -> tuple[int, ...]:
        """Micro-batches whose backward, or weight gradients, are still to come."""
        ...


class AutogradStage:
    """A stage from a function; gradients accumulate in the leaves of its graph.

    The gradients of every parameter are added in the order in which the schedule runs the
    backwards of this stage. The output itself is not kept: once it is sent, its memory is free,
    unless the last operation saved it.

    Args:
        function: ``(micro-batch, input or None) -> output``; of the last stage a loss. Under
            ``no_grad`` nothing is kept.
        rebuild: ``(micro-batch)``, runs what R asks for; None where the forward drops nothing
            that can be rebuilt before the backward.
        queued: called after every backward; takes the weight gradients that modules queued in it
            by themselves, and returns what computes them, which W does after the graph's own, and
            B at once. None where modules queue nothing.
        name: for the log.
    """

    def __init__(
        self,
        function: Callable[[int, Tensor | None], Tensor],
        *,
        rebuild: Callable[[int], None] | None = None,
        queued: Callable[[], Callable[[], None]] | None = None,
        name: str = "",
    ) -> None:
        self._function, self._rebuild, self._name = function, rebuild, name
        self._queued = queued
        self._graphs: dict[int, tuple[Tensor | None, GradientEdge, Tensor | None]] = {}
        self._deferred: dict[int, list[Callable[[], None]]] = {}
        self._under_way: dict[int, WeightGrads] = {}
        self.unsplit: str | None = None
        """Why I computes the whole backward and W nothing; None while they are split."""

    def forward(self, mb: int, x: Tensor | None) -> Tensor:
        """F; the result is detached."""
        if x is not None and torch.is_grad_enabled():
            x.requires_grad_()
        output = self._function(mb, x)
        if output.requires_grad:
            seed = torch.ones_like(output) if output.numel() == 1 else None
            self._graphs[mb] = (x, get_gradient_edge(output), seed)
        return output.detach()

    def backward(self, mb: int, grad: Tensor | None, *, defer_weights: bool) -> Tensor | None:
        """B, or I with ``defer_weights``."""
        x, output, seed = self._graphs.pop(mb)
        grad = seed if grad is None else grad
        assert grad is not None, f"{self._name}: micro-batch {mb} has no gradient and no loss"
        if defer_weights:
            deferred = WeightGrads(output, x)
            self._deferred[mb] = [deferred.finish]
            self._under_way[mb] = deferred
            try:
                deferred.backward(grad)
            finally:
                del self._under_way[mb]
            if self._queued is not None:
                self._deferred[mb].append(self._queued())
            else:
                self._announce(deferred.unsplit)
        else:
            torch.autograd.backward([output], [grad])
            if self._queued is not None:
                self._queued()()
        if x is None:
            return None
        gradient, x.grad = x.grad, None
        return gradient

    def weights(self, mb: int) -> None:
        """W."""
        for compute in self._deferred.pop(mb):
            compute()

    def weights_so_far(self, mb: int) -> None:
        """The part of W that an I under way has left so far; called from a hook of its graph."""
        self._under_way[mb].advance()
        if self._queued is not None:
            self._queued()()

    def recompute(self, mb: int) -> None:
        """R; what ``rebuild`` leaves, and checkpointed parts, run in the backward."""
        if self._rebuild is not None:
            self._rebuild(mb)

    @property
    def unfinished(self) -> tuple[int, ...]:
        """As in ``Stage``."""
        return (*self._graphs, *self._deferred)

    def _announce(self, reason: str | None) -> None:
        if reason is not None and self.unsplit is None:
            _LOGGER.info("%s: I computes the whole backward and W nothing: %s", self._name, reason)
            self.unsplit = reason
