"""Which stream is current in which phase, on streams that only take notes."""

import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from mhc_megatron.megatron import phases
from mhc_megatron.megatron.overlap import LaneOverlap, PhasedStage
from mhc_megatron.megatron.phased_tensor import _Gathered
from mhc_megatron.megatron.phases import Lanes, PhaseMarker
from mhc_megatron.pipeline.phases import Lane, Phase
from mhc_megatron.pipeline.turns import Turns

PHASES = (
    Phase("enter"),
    Phase("dispatch", Lane.COMMUNICATION, 0),
    Phase("experts", layer=0),
    Phase("mlp_post", Lane.PRIORITY, 0),
)


class Stream:
    """Notes what it waits for."""

    def __init__(self, name: str) -> None:
        self.name, self.notes = name, list[str]()

    def record_event(self) -> "Stream":
        return self

    def wait_event(self, event: "Stream") -> None:
        self.notes.append(event.name)

    wait_stream = wait_event


class Recorded:
    """The streams, and on which of them tensors were recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._own = threading.local()  # as on a GPU, each thread has a current stream
        self.compute = Stream("compute")
        self.tensors: list[tuple[int, str]] = []
        made = iter(["communication", "priority", "between"])
        for name, function in (
            ("current_stream", lambda *_: self.current),
            ("set_stream", self._set),
            ("Stream", lambda *_, **__: Stream(next(made))),
        ):
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(
            Tensor,
            "record_stream",
            lambda tensor, stream: self.tensors.append((tensor.data_ptr(), stream.name)),
        )
        self.lanes = Lanes(torch.device("cuda", 0))

    @property
    def current(self) -> Stream:
        return getattr(self._own, "stream", self.compute)

    def _set(self, stream: Stream) -> None:
        self._own.stream = stream


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return Recorded(monkeypatch)


def stage(recorded: Recorded, log: list[str]) -> tuple[PhasedStage, PhaseMarker]:
    marker = PhaseMarker(PHASES, recorded.lanes, rebuilds_ahead=False)

    def forward(mb: int, x: Tensor | None) -> Tensor:
        assert x is not None
        marker.start()
        log.append(recorded.current.name)
        for phase in PHASES[1:]:
            (x,) = marker.begin(phase.name, x * 2)
            log.append(recorded.current.name)
        x = x * 2
        marker.end(x)
        return x

    return PhasedStage(forward, marker, take_dropped=None), marker


def test_every_phase_runs_on_its_lane_and_a_forward_ends_on_the_compute_lane(
    recorded: Recorded,
) -> None:
    log: list[str] = []
    own, _ = stage(recorded, log)
    for mb in range(2):
        output = own.forward(mb, torch.ones(2))
        assert log == ["compute", "communication", "compute", "priority"]
        assert recorded.current is recorded.compute
        # The lanes wait for the phase before; at last the compute lane waits for all.
        streams = {lane.value: recorded.lanes.stream(lane) for lane in Lane}
        assert streams["communication"].notes == ["compute", "compute"]
        assert streams["priority"].notes == ["compute", "compute"]
        assert streams["compute"].notes == ["communication", "communication", "priority"]
        # What crosses is recorded where it arrives; the output, where the next stage reads it.
        names = [name for _, name in recorded.tensors]
        assert names == ["communication", "compute", "priority", "compute"]
        assert recorded.tensors[-1][0] == output.data_ptr()
        log.clear()
        recorded.tensors.clear()
        for stream in streams.values():
            stream.notes.clear()


def test_what_a_phase_reads_is_recorded_also_where_the_lane_stays(recorded: Recorded) -> None:
    """``mlp_post`` after ``unpermute`` reads streams that the compute lane made."""
    made = torch.ones(1), torch.ones(1)
    for tensor in made:
        recorded.lanes.enter(Lane.PRIORITY, recorded.compute.record_event(), [tensor, None])
    assert recorded.tensors == [(tensor.data_ptr(), "priority") for tensor in made]
    assert recorded.lanes.stream(Lane.PRIORITY).notes == ["compute"]


class Rebuilt:
    """A block of a recompute that notes among a stream's waits when it is rebuilt."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def rebuild_ahead(self) -> None:
        self._stream.notes.append("rebuild")


class Dropped:
    def __init__(self, *blocks: Rebuilt) -> None:
        self._blocks = list(blocks)

    def blocks_from_the_end(self) -> list[Rebuilt]:
        return self._blocks


def test_a_rebuild_that_comes_first_waits_for_the_compute_lane(recorded: Recorded) -> None:
    """However late the forward, on the other thread, begins."""
    log: list[str] = []
    own, _ = stage(recorded, log)
    phased = (*PHASES[:-1], Phase("mlp_post", layer=0, begins_block=True))
    other, marker = stage(recorded, log)
    marker.phases = phased
    priority: Any = recorded.lanes.stream(Lane.PRIORITY)
    other.take_dropped = lambda _: Dropped(Rebuilt(priority))  # type: ignore[assignment, return-value]
    other.forward(0, torch.ones(2))
    priority.notes.clear()

    def late(plan: Any) -> Turns:
        assert plan[0].op == "R"
        return Turns(plan)

    run = own.forward

    def forward(mb: int, x: Tensor | None) -> Tensor:
        time.sleep(0.2)
        return run(mb, x)

    own.forward = forward  # type: ignore[method-assign]
    LaneOverlap(recorded.lanes, turns=late)(
        (own, 1, torch.ones(2)), (other, 0, torch.ones(2)), lambda _: None, lambda _: None
    )
    assert priority.notes[:2] == ["compute", "rebuild"]


def test_what_stands_between_two_phases_is_on_no_lane(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or autograd would let a lane wait for a gradient before the turn of what it is for."""
    found: list[str] = []
    apply = phases._Boundary.apply

    def noting(*arguments: Any) -> Any:
        found.append(recorded.current.name)
        return apply(*arguments)

    monkeypatch.setattr(phases._Boundary, "apply", noting)
    log: list[str] = []
    stage(recorded, log)[0].forward(0, torch.ones(2))
    assert found == ["between"] * (len(PHASES) - 1)
    assert log == ["compute", "communication", "compute", "priority"]


def test_the_message_of_an_overlap_leaves_from_the_last_lane(recorded: Recorded) -> None:
    log: list[str] = []
    (own, _), (other, _) = stage(recorded, log), stage(recorded, log)
    other.forward(0, torch.ones(2))
    lanes: list[Any] = []
    overlap = LaneOverlap(recorded.lanes)
    overlap(
        (own, 1, torch.ones(2)),
        (other, 0, torch.ones(2)),
        lambda _: lanes.append(f"output on {recorded.current.name}"),
        lambda _: lanes.append(f"gradient on {recorded.current.name}"),
    )
    assert sorted(lanes) == ["gradient on compute", "output on priority"]
    assert recorded.current is recorded.compute


def test_a_sequence_that_is_gathered_again_is_recorded_where_it_is_read(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole by weight gradients, on the compute lane; a rebuilt part by the exchange itself."""
    monkeypatch.setattr(
        torch.distributed,
        "all_gather_into_tensor",
        lambda whole, part, group: whole.copy_(torch.cat([part, part])),
    )
    whole, part = torch.tensor([1.0, 2.0, 1.0, 2.0]), torch.tensor([1.0, 2.0])
    gathered = _Gathered(whole, part, None, recorded.lanes)
    assert whole.untyped_storage().nbytes() == 0
    gathered.gather()
    assert whole.tolist() == [1.0, 2.0, 1.0, 2.0]
    expected = [(whole.data_ptr(), "compute"), (part.data_ptr(), "communication")]
    assert recorded.tensors == expected


def test_what_goes_past_a_phase_is_not_recorded_there(recorded: Recorded) -> None:
    marker = PhaseMarker(PHASES, recorded.lanes, rebuilds_ahead=False)
    marker.start()
    read, past = torch.ones(1), torch.ones(1)
    marked = marker.begin("dispatch", read, past=[past])
    assert [tensor.data_ptr() for tensor in marked] == [read.data_ptr(), past.data_ptr()]
    assert recorded.tensors == [(read.data_ptr(), "communication")]
