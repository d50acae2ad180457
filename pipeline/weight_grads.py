"""The backward of one micro-batch in two halves: dgrad now, weight gradients later.

The nodes of an autograd graph through which the gradient flows back to the stage's input are the
spine. Every other node hangs off the spine at exactly one or several of its nodes, with parameters
at its ends. I runs the spine and notes the gradient that arrives at the nodes where parameters
hang; W continues from there. A node of the spine runs twice, but each time it computes only what
is asked for: the gradient of a matrix product's input in I, of its weight in W.

Exact, and no parameter is counted twice: what cannot be cut off at one node is computed in I.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

# How torch names the nodes of C++'s torch::autograd::Function.
_OF_EXTENSION = "torch::autograd::CppNode<"


class WeightGrads:
    """Backward of one graph: ``backward`` first (I), ``finish`` any time later (W).

    Computed in I are the gradients of parameters that several nodes of the spine use; those of a
    ``torch.autograd.Function``, or of C++'s, that takes the parameter itself, since its backward
    computes all of its gradients together (a class attribute ``separable = True`` says that it
    does not); and without an input the parameters furthest from the loss, such as an embedding.

    Args:
        output: of the stage.
        x: the stage's input, a leaf; None for the first stage.

    Attributes:
        unsplit: why ``backward`` computes everything and ``finish`` nothing; None if they share.
    """

    def __init__(self, output: GradientEdge, x: Tensor | None) -> None:
        self._output = output
        self._pieces: dict[Node, list[Tensor]] = {}
        self._arrived: dict[Node, tuple[Tensor | None, ...]] = {}
        self._now: list[Tensor] = []
        order = _children_first(output.node)
        self.unsplit = _reentrant(order)
        if self.unsplit is None:
            self._plan(order, x)

    def backward(self, grad: Tensor) -> None:
        """I: accumulate the input's gradient and those that cannot wait."""
        if self.unsplit is not None:
            torch.autograd.backward([self._output], [grad])
            return
        hooks = [node.register_prehook(self._noting(node)) for node in self._pieces]
        try:
            torch.autograd.backward([self._output], [grad], inputs=self._now, retain_graph=True)
        finally:
            for hook in hooks:
                hook.remove()

    def finish(self) -> None:
        """W: accumulate the other parameters' gradients, and let go of the graph."""
        self.advance()
        assert not self._pieces, f"{len(self._pieces)} nodes that I has not reached"

    def advance(self) -> None:
        """The part of W whose gradients have arrived; may be called while ``backward`` runs."""
        for node in [node for node in self._pieces if node in self._arrived]:
            parameters = self._pieces.pop(node)
            arrived = [
                (GradientEdge(node, index), gradient)
                for index, gradient in enumerate(self._arrived.pop(node))
                if gradient is not None
            ]
            edges, gradients = zip(*arrived, strict=True)
            torch.autograd.backward(edges, gradients, inputs=parameters)

    def _noting(self, node: Node) -> Callable[[tuple[Tensor, ...]], None]:
        def note(gradients: tuple[Tensor, ...]) -> None:
            self._arrived[node] = gradients

        return note

    def _plan(self, order: list[Any], x: Tensor | None) -> None:
        leaves = [node for node in order if _is_leaf(node)]
        ends = [leaf for leaf in leaves if leaf.variable is x] if x is not None else []
        end = ends[0] if ends else _furthest(order)
        spine: set[Any] = {end}
        hanging: dict[Any, frozenset[Any]] = {}  # the leaves below a node off the spine
        owners: dict[Any, set[Any]] = defaultdict(set)
        for node in order:
            children = list(_children(node))
            if node is not end and not any(child in spine for child in children):
                below: frozenset[Any] = frozenset().union(*(hanging[c] for c in children))
                hanging[node] = below | {node} if _is_leaf(node) else below
                continue
            spine.add(node)
            for child in children:
                if child not in spine:
                    for leaf in hanging[child]:
                        owners[leaf].add(node)
        self._now = [end.variable]
        for leaf in leaves:
            if leaf is end:
                continue
            owner = next(iter(owners[leaf])) if len(owners[leaf]) == 1 else None
            if owner is None or not _separable(owner):
                self._now.append(leaf.variable)
            else:
                self._pieces.setdefault(owner, []).append(leaf.variable)
        if not self._pieces:
            self.unsplit = "every parameter's gradient is computed with the input's"


def _children(node: Node) -> Iterator[Any]:
    return (child for child, _ in node.next_functions if child is not None)


def _children_first(root: Any) -> list[Any]:
    """All nodes of the graph, each after those that it passes gradients to."""
    order, seen, stack = [], {root}, [(root, _children(root))]
    while stack:
        node, children = stack[-1]
        child = next((child for child in children if child not in seen), None)
        if child is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(child)
            stack.append((child, _children(child)))
    return order


def _is_leaf(node: Node) -> bool:
    return hasattr(node, "variable")


def _furthest(order: list[Any]) -> Any:
    """The leaf with the longest way from the output; of several, the first found."""
    depth = {order[-1]: 0}
    for node in reversed(order):
        for child in _children(node):
            depth[child] = max(depth.get(child, 0), depth[node] + 1)
    return max((node for node in order if _is_leaf(node)), key=depth.__getitem__)


def _function_of(node: Node) -> type | None:
    """The ``torch.autograd.Function`` behind a node, if it is one."""
    return getattr(node, "_forward_cls", None)


def _separable(node: Node) -> bool:
    function = _function_of(node)
    if function is None:
        # An extension's own function, in C++, is like one of Python's.
        return not node.name().startswith(_OF_EXTENSION)
    return getattr(function, "separable", False)


def _reentrant(order: list[Any]) -> str | None:
    for node in order:
        function = _function_of(node)
        # torch's and Megatron's have this name, and refuse a backward with chosen inputs.
        if function is not None and function.__name__ == "CheckpointFunction":
            return "activation checkpoints run their whole backward at once"
    return None
