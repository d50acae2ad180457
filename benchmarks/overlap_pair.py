"""A forward and a backward of one stage, interleaved or not, launched by the host or as graphs."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from captured import capture
from te_blocks import Stage
from torch import Tensor

from mhc_megatron.megatron.chain import chain_of
from mhc_megatron.megatron.chunk_phases import mark_phases
from mhc_megatron.megatron.delayed_wgrad import QueuedWeightGrads
from mhc_megatron.megatron.overlap import LaneOverlap, PhasedStage
from mhc_megatron.megatron.phases import Lanes
from mhc_megatron.pipeline.interleave import interleave
from mhc_megatron.pipeline.phases import OverlapMode, Phase, Plan
from mhc_megatron.pipeline.stage import AutogradStage
from mhc_megatron.pipeline.turns import Turns
from mhc_megatron.recompute import ForwardRecompute

WARM_UP = 2


class Pair:
    """Forwards and backwards of a stage under one mode.

    Args:
        stage: with hyper-connections, whose chain's recompute is then this pair's.
        mode: of the overlap.
        lanes: of its phases.
        planner, turns: as for ``LaneOverlap``.
    """

    def __init__(
        self,
        stage: Stage,
        mode: OverlapMode,
        lanes: Lanes,
        planner: Callable[..., Plan] = interleave,
        turns: Callable[[Plan], Turns] = Turns,
    ) -> None:
        self._chunk: Any = stage.chunk
        self._data, self.lanes = stage, lanes
        chain = chain_of(stage.chunk)
        assert chain is not None
        self._chain, self._recompute = chain, chain.recompute
        self._dropped: dict[int, ForwardRecompute] = {}
        queued = QueuedWeightGrads(stage.chunk)
        options: dict[str, Any] = {"queued": queued.take if queued else None, "name": mode}
        self.phases: tuple[Phase, ...] = ()
        chain.marker = self._marker = None
        self._stage: AutogradStage = AutogradStage(self._forward, **options)
        if mode != "none":
            mark_phases(stage.chunk, lanes, mode, ends_model=False)
            self._marker = chain.marker
            assert self._marker is not None
            self.phases = self._marker.phases
            ahead = self._marker.rebuilds_ahead
            options["take_dropped"] = self._dropped.pop if ahead else None
            self._stage = PhasedStage(self._forward, self._marker, **options)
        self._overlap = LaneOverlap(lanes, planner, turns)

    def first_forward(self) -> None:
        """Of micro-batch 0."""
        self._chain.marker, self._chain.recompute = self._marker, self._recompute
        self._stage.forward(0, self._input())

    def step(self) -> tuple[Tensor, Tensor]:
        """Micro-batch 1's forward with 0's backward: the output and the input's gradient."""
        forward = (self._stage, 1, self._input())
        if self._marker is None:
            output = self._stage.forward(*forward[1:])
            gradient = self._stage.backward(0, self._data.grad, defer_weights=False)
        else:
            outputs: list[Tensor] = []
            gradients: list[Tensor | None] = []
            backward = (self._stage, 0, self._data.grad)
            self._overlap(forward, backward, outputs.append, gradients.append)
            [output], [gradient] = outputs, gradients
        assert gradient is not None
        return output, gradient

    def last_backward(self) -> None:
        """Of micro-batch 1."""
        self._stage.backward(1, self._data.grad, defer_weights=False)
        self._dropped.clear()

    def _input(self) -> Tensor:
        return self._data.x.detach().clone()

    def _forward(self, mb: int, x: Tensor | None) -> Tensor:
        if self._marker is not None:
            self._marker.start()
        self._chunk.set_input_tensor(x)
        output: Tensor = self._chunk(None, self._data.positions, None)
        if self._marker is not None:
            if self._marker.rebuilds_ahead:
                assert self._recompute is not None
                self._dropped[mb] = self._recompute.take()
            self._marker.end(output)
        return output


class GraphedPair:
    """A ``Pair`` whose three calls are CUDA graphs, which share their memory.

    Args:
        stage: of the pair; its gradients are the graphs' from now on.
        pair: on lanes that begin and end with the current stream.
    """

    def __init__(self, stage: Stage, pair: Pair) -> None:
        self.phases = pair.phases
        self._lanes = pair.lanes if pair.phases else None
        for _ in range(WARM_UP):
            stage.forget()
            pair.first_forward()
            pair.step()
            pair.last_backward()
        stage.forget()
        torch.cuda.synchronize()
        first, _ = self._capture(pair.first_forward)
        step, self._results = self._capture(pair.step, first.pool())
        last, _ = self._capture(pair.last_backward, first.pool())
        self._graphs = first, step, last
        self._gradients = [(tensor, tensor.grad) for tensor in stage.chunk.parameters()]

    def _capture(self, call: Callable[[], Any], pool: Any = None) -> Any:
        def on_lanes() -> Any:
            if self._lanes is not None:  # a backward ends by waiting for all of them
                self._lanes.fork()
            return call()

        return capture(on_lanes, pool)

    def first_forward(self) -> None:
        """As in ``Pair``."""
        for tensor, gradient in self._gradients:
            tensor.grad = gradient
        self._graphs[0].replay()

    def step(self) -> tuple[Tensor, Tensor]:
        """As in ``Pair``; the results are overwritten by the next step."""
        self._graphs[1].replay()
        return self._results

    def last_backward(self) -> None:
        """As in ``Pair``."""
        self._graphs[2].replay()


def release() -> None:
    """Give back the memory of pairs that are gone; a graph's is never used for anything else."""
    gc.collect()
    torch.cuda.empty_cache()


def bits_of(stage: Stage, pair: Pair | GraphedPair) -> list[Tensor]:
    """Output, input's gradient and all parameters' gradients of a pair and what follows it."""
    stage.forget()
    pair.first_forward()
    found = [tensor.clone() for tensor in pair.step()]
    pair.last_backward()
    gradients = [parameter.grad for parameter in stage.chunk.parameters()]
    return found + [gradient.clone() for gradient in gradients if gradient is not None]
