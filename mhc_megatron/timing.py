"""The time that hyper-connections take, where they run: between points on the GPU's stream."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mhc_megatron.kernels import PackedMappings

_Mark = torch.cuda.Event | float
_ACCUMULATE = "torch::autograd::AccumulateGrad"


class HyperConnectionTimer:
    """Adds up spans of time, by kind. Nothing waits for the GPU before ``milliseconds``.

    ``kernel`` is an ``observer`` of hyper-connections, ``rebuild`` one of their recompute. They run
    what they are given on the same tensors, so results are the same bits. A backward is timed by
    hooks of the graph's nodes between a kernel's results and its operands, in whatever order
    autograd calls them.

    Args:
        on_gpu: CUDA events on the current stream; else the host's clock. On the stream a span
            includes the gaps where the GPU waits for the next launch inside it.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._spans: dict[str, list[tuple[Any, Any]]] = {}

    def kernel(self, kernel: Callable[..., Any], *operands: Any, **settings: Any) -> Any:
        """Time one call as ``forward``, and its ``backward`` when that comes."""
        returned = self._timed("forward", kernel, *operands, **settings)
        for node in _nodes_between(returned, (operands, tuple(settings.values()))):
            self._time_node(node)
        return returned

    def rebuild(self, rebuild: Callable[..., Any], *operands: Any) -> Any:
        """Time one block's rebuilding as ``rebuild``."""
        return self._timed("rebuild", rebuild, *operands)

    def milliseconds(self) -> dict[str, float]:
        """The sum of each kind that there was; waits for the last span to end."""
        kinds = [kind for kind in ("forward", "backward", "rebuild") if kind in self._spans]
        return {kind: sum(_elapsed(*span) for span in self._spans[kind]) for kind in kinds}

    def _timed(self, kind: str, call: Callable[..., Any], *operands: Any, **settings: Any) -> Any:
        start = self._mark()
        returned = call(*operands, **settings)
        self._add(kind, start)
        return returned

    def _time_node(self, node: torch.autograd.graph.Node) -> None:
        started: list[_Mark] = []
        node.register_prehook(lambda _: started.append(self._mark()))
        node.register_hook(lambda *_: self._add("backward", started.pop()))

    def _mark(self) -> _Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, kind: str, start: _Mark) -> None:
        self._spans.setdefault(kind, []).append((start, self._mark()))


def _elapsed(start: Any, stop: Any) -> float:
    if isinstance(start, float):
        return 1e3 * (stop - start)
    stop.synchronize()
    return start.elapsed_time(stop)


def _nodes_between(returned: Any, operands: Any) -> set[torch.autograd.graph.Node]:
    """Nodes that lead from ``returned`` to ``operands``, without those that made the operands."""
    made_before = {tensor.grad_fn for tensor in _tensors(operands)}
    found: set[torch.autograd.graph.Node] = set()
    ahead = [tensor.grad_fn for tensor in _tensors(returned)]
    while ahead:
        node = ahead.pop()
        if node is None or node in made_before or node in found or node.name() == _ACCUMULATE:
            continue
        found.add(node)
        ahead.extend(following for following, _ in node.next_functions)
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, PackedMappings):
        yield from _tensors((value.packed, value.source, value.through))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
