"""The phases of a model chunk: where its layers say that one begins, and on which stream it runs.

``PhaseMarker.begin`` stands between two phases of a layer's forward. It puts a node into the
graph there, which does nothing but say, in the backward, that the same two phases follow each other
the other way round. So the graph is whole, and every sum has the order that it has without phases.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mhc_megatron.errors import UserError
from mhc_megatron.pipeline.phases import Lane, Phase
from mhc_megatron.pipeline.turns import Turns


class Lanes:
    """The streams of one rank.

    What crosses from one lane to another is recorded on both (``Tensor.record_stream``): the
    allocator then waits with its memory for the work that the other lane has enqueued when the
    tensor goes, in the backward too, where autograd runs every node on its forward's stream.

    Args:
        device: a GPU, or the CPU, which has one lane for all.
    """

    def __init__(self, device: torch.device) -> None:
        self.compute: Any = None
        self._between: Any = None
        self._streams: dict[Lane, Any] = {}
        if device.type == "cuda":
            self.compute = torch.cuda.current_stream(device)
            self._streams = {
                Lane.COMPUTE: self.compute,
                Lane.COMMUNICATION: torch.cuda.Stream(device),
                Lane.PRIORITY: torch.cuda.Stream(device, priority=-1),
            }
            self._between = torch.cuda.Stream(device)

    def stream(self, lane: Lane) -> Any:
        """A ``torch.cuda.Stream``; None on the CPU."""
        return self._streams.get(lane)

    @property
    def of_states(self) -> tuple[Any, ...]:
        """The streams that use the states and the branches' inputs; none on the CPU."""
        lanes = (Lane.COMPUTE, Lane.PRIORITY) if self._streams else ()
        return tuple(self._streams[lane] for lane in lanes)

    def enter(self, lane: Lane, ended: Any, tensors: Sequence[Tensor | None]) -> None:
        """Go on with ``lane``, after the event ``ended``, with ``tensors`` of any lane."""
        stream = self.stream(lane)
        if stream is None:
            return
        if stream != torch.cuda.current_stream():
            stream.wait_event(ended)
            torch.cuda.set_stream(stream)
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(stream)

    def record(self, lane: Lane, tensor: Tensor) -> None:
        """Say that ``lane`` uses a tensor, of whichever lane its memory is."""
        stream = self.stream(lane)
        if stream is not None:
            tensor.record_stream(stream)

    @contextlib.contextmanager
    def between(self) -> Iterator[None]:
        """On a stream of its own, on which nothing is computed.

        Autograd lets the stream of a node wait for its gradients as soon as they are made. Were it
        a lane's, what the other side enqueues there before the node's turn would wait too.
        """
        if self._between is None:
            yield
            return
        before = torch.cuda.current_stream()
        torch.cuda.set_stream(self._between)
        try:
            yield
        finally:
            torch.cuda.set_stream(before)

    def end_of_phase(self) -> Any:
        """An event after what the current lane has enqueued; None on the CPU."""
        return torch.cuda.current_stream().record_event() if self._streams else None

    def fork(self) -> None:
        """Let the other lanes wait for the compute lane."""
        for stream in self._streams.values():
            if stream != self.compute:
                stream.wait_stream(self.compute)

    def join(self) -> None:
        """Let the compute lane wait for the others, and go on with it."""
        for stream in self._streams.values():
            if stream != self.compute:
                self.compute.wait_stream(stream)
        if self._streams:
            torch.cuda.set_stream(self.compute)


class PhaseMarker:
    """One chunk's phases, in the order of its forward.

    Args:
        phases: of the chunk.
        lanes: of this rank.
        rebuilds_ahead: R of an Overlap's plan rebuilds recompute blocks.

    Attributes:
        turns: of the Overlap whose forward is this chunk's; None outside one.
        reached: told of every phase whose backward begins, but for the last phase's, in an Overlap
            whose backward is this chunk's; None outside one.
    """

    def __init__(self, phases: tuple[Phase, ...], lanes: Lanes, *, rebuilds_ahead: bool) -> None:
        self.phases, self.lanes, self.rebuilds_ahead = phases, lanes, rebuilds_ahead
        self.turns: Turns | None = None
        self.reached: Callable[[int], None] | None = None
        self._at = 0

    def start(self) -> None:
        """The forward of a micro-batch begins, with the first phase.

        In an Overlap the lanes have been forked, for both sides.
        """
        self._at = 0
        if self.turns is None:
            self.lanes.fork()
        self._wait()

    def begin(
        self,
        name: str,
        *tensors: Tensor,
        past: Sequence[Tensor] = (),
        used: Sequence[Tensor | None] = (),
    ) -> tuple[Tensor, ...]:
        """The next phase begins.

        Args:
            name: of the phase, to be sure that it is the expected one.
            tensors: all through which a gradient comes back from this phase to the one before.
            past: those through which one comes back from a later phase, past this one.
            used: what else the phase reads and an earlier one made.

        Returns:
            ``tensors`` and ``past``, with the boundary in their graph.

        Raises:
            UserError: the chunk's layers do not run the phases that it was planned for.
        """
        self._at += 1
        expected = self.phases[self._at] if self._at < len(self.phases) else None
        if expected is None or expected.name != name:
            raise UserError(
                f"the phase {name} begins where {expected or 'the end of the stage'} was planned; "
                "parallel.overlap needs the layers of a stage to run in their order, once each: "
                "set parallel.overlap=none"
            )
        with self.lanes.between():
            marked: tuple[Tensor, ...] = _Boundary.apply(self, self._at, *tensors, *past)
        ended = self.lanes.end_of_phase()
        self._wait()
        self.lanes.enter(expected.lane, ended, [*marked[: len(tensors)], *used])
        return marked

    def end(self, output: Tensor) -> None:
        """The forward has ended with ``output``.

        In an Overlap the last phase's lane stays the current one, from which the message leaves.
        """
        if self._at != len(self.phases) - 1:
            raise UserError(
                f"the forward ended in the phase {self.phases[self._at]}, before "
                f"{self.phases[-1]}; set parallel.overlap=none"
            )
        if self.lanes.compute is not None:
            output.record_stream(self.lanes.compute)
        if self.turns is None:
            self.lanes.join()

    def _wait(self) -> None:
        if self.turns is not None:
            step = self.turns.next("forward")
            assert step.phase == self._at, f"{step} is next, not the phase {self._at}"


class _Boundary(torch.autograd.Function):
    """Between two phases. Its backward runs when all gradients of the later one are there."""

    @staticmethod
    def forward(ctx: Any, marker: PhaseMarker, place: int, *tensors: Tensor) -> Any:
        ctx.marker, ctx.place = marker, place
        ctx.set_materialize_grads(False)
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        reached = ctx.marker.reached
        if reached is not None:
            reached(ctx.place - 1)
        return None, None, *grads
