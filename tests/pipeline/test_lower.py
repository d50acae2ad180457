"""Sends and receives: complete, in one order per directed edge, and free of deadlocks."""

from collections import Counter, defaultdict, deque
from collections.abc import Callable

import pytest
from helpers.schedules import schedules
from hypothesis import given, settings

from mhc_megatron.pipeline.actions import Action, Compute, Op, Overlap, Transfer, parts
from mhc_megatron.pipeline.catalogue import generate
from mhc_megatron.pipeline.errors import Deadlock
from mhc_megatron.pipeline.lower import Program, lower, lower_rank
from mhc_megatron.pipeline.schedule import Schedule

PROPERTY = settings(deadline=None, max_examples=60, derandomize=True)
Edges = dict[tuple[int, int], list[Compute]]


def _edges(programs: tuple[Program, ...], kind: str) -> Edges:
    """What is sent (or received) on every directed edge, in order."""
    edges: Edges = defaultdict(list)
    for rank, program in enumerate(programs):
        for step in program:
            if isinstance(step, Transfer) and step.kind == kind:
                edge = (rank, step.peer) if kind == "send" else (step.peer, rank)
                edges[edge].append(step.of)
    return dict(edges)


@given(schedules())
@PROPERTY
def test_every_edge_is_first_in_first_out(schedule: Schedule) -> None:
    programs = lower(schedule)
    assert _edges(programs, "send") == _edges(programs, "post") == _edges(programs, "recv")


@given(schedules())
@PROPERTY
def test_every_dependency_between_ranks_has_one_transfer(schedule: Schedule) -> None:
    """Counted from the placement: each boundary between two ranks, once each way."""
    rank_of, expected = schedule.placement.rank_of, []
    for mb in range(schedule.num_mb):
        for stage in range(schedule.num_stages - 1):
            low, high = rank_of(stage, mb), rank_of(stage + 1, mb)
            if low != high:
                expected += [((low, high), "F", stage, mb), ((high, low), "G", stage + 1, mb)]
    sent = [
        (edge, "F" if of.op is Op.F else "G", of.stage, of.mb)
        for edge, messages in _edges(lower(schedule), "send").items()
        for of in messages
    ]
    assert sorted(sent) == sorted(expected)
    assert all(low != high for (low, high), *_ in sent)


@given(schedules())
@PROPERTY
def test_the_computes_are_the_schedules(schedule: Schedule) -> None:
    for row, program in zip(schedule.ranks, lower(schedule), strict=True):
        assert [step for step in program if not isinstance(step, Transfer)] == list(row)


def _run(
    programs: tuple[Program, ...], advance: Callable[[int, Action | Transfer], bool]
) -> list[str]:
    """Run all programs until nobody can go on; what each rank that has not ended stands before.

    ``advance`` takes a rank's next step, and returns False where the rank has to wait.
    """
    at = [0] * len(programs)
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while at[rank] < len(program) and advance(rank, program[at[rank]]):
                at[rank] += 1
                moved = True
    return [
        str(program[position])
        for program, position in zip(programs, at, strict=True)
        if position < len(program)
    ]


def _execute(schedule: Schedule, programs: tuple[Program, ...]) -> None:
    """Run the programs with blocking receives over queues; check every input is there."""
    queues: dict[tuple[int, int], deque[Compute]] = defaultdict(deque)
    have: list[set[Compute]] = [set() for _ in programs]

    def advance(rank: int, step: Action | Transfer) -> bool:
        if not isinstance(step, Transfer):
            for compute in parts(step):
                _check_inputs(schedule, compute, have[rank])
            have[rank].update(parts(step))
        elif step.kind == "recv":
            queue = queues[step.peer, rank]
            if not queue:
                return False
            assert queue.popleft() == step.of
            have[rank].add(step.of)
        elif step.kind == "send":
            assert step.of in have[rank]
            queues[rank, step.peer].append(step.of)
        return True

    assert _run(programs, advance) == []
    assert not any(queues.values())


def _check_inputs(schedule: Schedule, compute: Compute, have: set[Compute]) -> None:
    op, stage, mb = compute.op, compute.stage, compute.mb
    if op is Op.F and stage:
        assert Compute(Op.F, stage - 1, mb) in have
    if op in (Op.B, Op.I) and stage + 1 < schedule.num_stages:
        assert {Compute(Op.B, stage + 1, mb), Compute(Op.I, stage + 1, mb)} & have
    if op in (Op.B, Op.I, Op.R):
        assert Compute(Op.F, stage, mb) in have
    if op is Op.W:
        assert Compute(Op.I, stage, mb) in have


@given(schedules())
@PROPERTY
def test_programs_run_to_their_end(schedule: Schedule) -> None:
    _execute(schedule, lower(schedule))


def _stuck(programs: tuple[Program, ...]) -> list[str]:
    """What each rank cannot do, if every compute first waits for all messages under way.

    As one does that makes a GPU load a kernel. A message is under way on the rank that sends or
    posts it, until there are both.
    """
    sent: dict[tuple[int, int], Counter[str]] = defaultdict(Counter)

    def idle(rank: int) -> bool:
        goes = (counts for (source, _), counts in sent.items() if source == rank)
        comes = (counts for (_, target), counts in sent.items() if target == rank)
        return all(counts["send"] <= counts["post"] for counts in goes) and all(
            counts["post"] <= counts["send"] for counts in comes
        )

    def advance(rank: int, step: Action | Transfer) -> bool:
        if not isinstance(step, Transfer):
            return idle(rank)
        edge = (rank, step.peer) if step.kind == "send" else (step.peer, rank)
        counts = sent[edge]
        if step.kind == "recv" and counts["recv"] == counts["send"]:
            return False
        counts[step.kind] += 1
        return True

    return _run(programs, advance)


@pytest.mark.parametrize("forward_only", [False, True])
@given(schedule=schedules())
@PROPERTY
def test_computes_may_wait_for_all_messages(schedule: Schedule, forward_only: bool) -> None:
    assert not _stuck(lower(schedule, forward_only=forward_only))


def _posted_at_once(program: Program, ahead: int) -> Program:
    """With the first receives posted before anything else, as soon as there is a place."""
    receives = [step for step in program if isinstance(step, Transfer) and step.kind == "recv"]
    posts = deque(Transfer("post", step.of, step.peer) for step in receives)
    made: list = [posts.popleft() for _ in range(min(ahead, len(posts)))]
    for step in program:
        if isinstance(step, Transfer) and step.kind == "post":
            continue
        made.append(step)
        if isinstance(step, Transfer) and step.kind == "recv" and posts:
            made.append(posts.popleft())
    return tuple(made)


def test_receives_that_are_posted_too_early_are_found() -> None:
    """Rank 0 waits for a gradient before the forward that it comes from."""
    programs = lower(generate("one_f_one_b", num_ranks=2, num_mb=4))
    assert _stuck(tuple(_posted_at_once(program, ahead=2) for program in programs)) == [
        "0F0",
        "recv 0F0 from 0",
    ]


@pytest.mark.parametrize("name", ["one_f_one_b", "interleaved", "zb_h1", "dualpipe_v", "dualpipe"])
def test_few_messages_wait_for_their_receiver(name: str) -> None:
    """Each takes the memory of one state."""
    most = 0
    for program in lower(generate(name, num_ranks=8, num_mb=32)):
        waiting = 0
        for step in program:
            if isinstance(step, Transfer) and step.kind != "send":
                waiting += 1 if step.kind == "post" else -1
                most = max(most, waiting)
    assert most <= 4


@given(schedules())
@PROPERTY
def test_forward_only(schedule: Schedule) -> None:
    programs = lower(schedule, forward_only=True)
    _execute(schedule, programs)
    computes = [step for program in programs for step in program if not isinstance(step, Transfer)]
    assert all(isinstance(step, Compute) and step.op is Op.F for step in computes)
    assert len(set(computes)) == len(computes) == schedule.num_stages * schedule.num_mb


def test_a_program() -> None:
    schedule = generate("dualpipe_v", num_ranks=2, num_mb=4)
    assert [str(step) for step in lower_rank(schedule, 0)] == [
        "0F0",
        "send 0F0 to 1",
        "0F1",
        "send 0F1 to 1",
        "0F2",
        "send 0F2 to 1",
        "post 2F0 from 1",
        "recv 2F0 from 1",
        "3F0",
        "3I0",
        "send 3I0 to 1",
        "post 2F1 from 1",
        "3W0",
        "recv 2F1 from 1",
        "3F1",
        "(0F3;3B1)",
        "send 0F3 to 1",
        "send 3B1 to 1",
        "post 2F2 from 1",
        "post 1B0 from 1",
        "recv 2F2 from 1",
        "recv 1B0 from 1",
        "(3F2;0B0)",
        "3B2",
        "send 3B2 to 1",
        "post 2F3 from 1",
        "post 1B1 from 1",
        "recv 2F3 from 1",
        "recv 1B1 from 1",
        "(3F3;0B1)",
        "3B3",
        "send 3B3 to 1",
        "post 1B2 from 1",
        "recv 1B2 from 1",
        "0I2",
        "0W2",
        "post 1I3 from 1",
        "recv 1I3 from 1",
        "0I3",
        "0W3",
    ]


def test_an_invalid_schedule_is_not_lowered() -> None:
    schedule = generate("gpipe", num_ranks=2, num_mb=1)
    with pytest.raises(Deadlock, match="rank 0 at 0B0 waits for 1B0"):
        lower_rank(schedule.with_rank(1, [Compute(Op.F, 1, 0)]), 0)


def test_an_overlap_is_a_forward_and_a_whole_backward() -> None:
    with pytest.raises(AssertionError):
        Overlap(Compute(Op.F, 0, 1), Compute(Op.I, 0, 0))
