"""The Overlap of a schedule, executed: a forward and a backward that take turns, phase by phase.

The forward runs on the caller's thread, the backward on one beside it, and only one of the two is
under way at any time: the plan says which. What runs at the same time is what they have enqueued on
different streams. Neither graph is cut, so gradients have the bits of the forward and then the
backward.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from mhc_megatron.megatron.cpu_runtime import cpu_runtime_in_thread
from mhc_megatron.megatron.phases import Lanes, PhaseMarker
from mhc_megatron.pipeline.executor import GradientMade, OutputMade, Side
from mhc_megatron.pipeline.interleave import interleave
from mhc_megatron.pipeline.phases import Lane, Phase, Plan
from mhc_megatron.pipeline.stage import AutogradStage
from mhc_megatron.pipeline.turns import Abandoned, Turns
from mhc_megatron.recompute import ForwardRecompute


class PhasedStage(AutogradStage):
    """A stage of a chunk with phases.

    Args:
        function: as for AutogradStage; it runs the chunk between ``marker.start`` and ``end``.
        marker: of the chunk's phases.
        take_dropped: by micro-batch, hands over what its forward dropped, for R of a plan; None
            where the backward rebuilds as it goes.
        options: of AutogradStage.
    """

    def __init__(
        self,
        function: Callable[[int, Tensor | None], Tensor],
        marker: PhaseMarker,
        *,
        take_dropped: Callable[[int], ForwardRecompute] | None,
        **options: Any,
    ) -> None:
        super().__init__(function, **options)
        self.marker, self.take_dropped = marker, take_dropped

    def backward(self, mb: int, grad: Tensor | None, *, defer_weights: bool) -> Tensor | None:
        """As in AutogradStage; the compute lane then waits for what ran on others."""
        gradient = super().backward(mb, grad, defer_weights=defer_weights)
        self.marker.lanes.join()
        return gradient


class LaneOverlap:
    """``overlap`` of ``execute``, for stages that are PhasedStage.

    Args:
        lanes: of this rank.
        planner: as ``interleave``, which it is by default.
        turns: makes the turns of every Overlap from its plan; a subclass of Turns can watch them.
    """

    def __init__(
        self,
        lanes: Lanes,
        planner: Callable[..., Plan] = interleave,
        turns: Callable[[Plan], Turns] = Turns,
    ) -> None:
        self._lanes, self._planner, self._turns = lanes, planner, turns
        self._thread = ThreadPoolExecutor(
            1, "backward", torch.set_num_threads, (torch.get_num_threads(),)
        )
        self._plans: dict[tuple[tuple[Phase, ...], tuple[Phase, ...], bool], Plan] = {}

    def __call__(
        self,
        forward: Side,
        backward: Side,
        output_made: OutputMade,
        gradient_made: GradientMade,
    ) -> None:
        """Run both sides in turns.

        Args:
            forward, backward: stage, micro-batch, and input or gradient.
            output_made: given the forward's output while the backward may be under way.
            gradient_made: given the gradient of the backward's stage's input, on the backward's
                thread, while the forward may be under way and weight gradients are to come.

        Raises:
            The error of the side that failed by itself.
        """
        own, other = forward[0], backward[0]
        assert isinstance(own, PhasedStage) and isinstance(other, PhasedStage)
        turns = self._turns(self._plan(own, other))
        side = _BackwardSide(turns, backward, gradient_made)
        own.marker.turns = turns
        # Before either side: a plan may begin with a rebuild, of what the compute lane is still at.
        self._lanes.fork()
        future = self._thread.submit(side.run)
        try:
            output_made(own.forward(forward[1], forward[2]))
            turns.end("forward")
        except BaseException as error:
            turns.fail()
            reason = future.exception()
            if isinstance(error, Abandoned) and reason is not None:
                raise reason from None
            raise
        finally:
            own.marker.turns = None
            self._lanes.join()
        future.result()
        self._lanes.join()

    def _plan(self, own: PhasedStage, other: PhasedStage) -> Plan:
        key = own.marker.phases, other.marker.phases, other.take_dropped is not None
        if key not in self._plans:
            self._plans[key] = self._planner(key[0], key[1], rebuild=key[2])
        return self._plans[key]


class _BackwardSide:
    """What runs on the backward's thread, and on the GPU's thread of autograd in its place."""

    def __init__(self, turns: Turns, side: Side, made: GradientMade) -> None:
        stage, mb, self._grad = side
        assert isinstance(stage, PhasedStage)
        self._turns, self._stage, self._mb, self._made = turns, stage, mb, made
        self._lanes = stage.marker.lanes
        dropped = stage.take_dropped(mb) if stage.take_dropped is not None else None
        self._blocks = [] if dropped is None else dropped.blocks_from_the_end()

    def run(self) -> None:
        try:
            with cpu_runtime_in_thread():
                self._run()
        except BaseException:
            self._turns.fail()
            raise

    def _run(self) -> None:
        if self._lanes.compute is not None:
            torch.cuda.set_stream(self._lanes.compute)
        marker = self._stage.marker
        self._reached(len(marker.phases) - 1)
        marker.reached = self._reached
        try:
            gradient = self._stage.backward(self._mb, self._grad, defer_weights=True)
        finally:
            marker.reached = None
        self._made(gradient)
        while self._turns.has_next("backward"):
            step = self._turns.next("backward")
            assert step.op == "W", f"{step} after the backward"
        self._stage.weights(self._mb)
        self._turns.end("backward")

    def _reached(self, phase: int) -> None:
        """A phase's backward may begin; what the plan has before it runs here."""
        while True:
            step = self._turns.next("backward")
            if step.op == "B":
                assert step.phase == phase, f"{step} is next, not the backward of {phase}"
                return
            if step.op == "W":
                with torch.cuda.stream(self._lanes.compute):
                    self._stage.weights_so_far(self._mb)
            else:
                with torch.cuda.stream(self._lanes.stream(Lane.PRIORITY)):
                    self._blocks.pop(0).rebuild_ahead()
