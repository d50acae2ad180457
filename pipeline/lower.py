"""From computes to programs: add the sends and receives that a schedule implies."""

from collections import deque
from collections.abc import Iterator

from mhc_megatron.pipeline.actions import Action, Compute, Op, Overlap, Transfer, parts
from mhc_megatron.pipeline.dataflow import inputs_of, message_of
from mhc_megatron.pipeline.schedule import Schedule

Program = tuple[Action | Transfer, ...]


def lower(schedule: Schedule, *, forward_only: bool = False) -> tuple[Program, ...]:
    """``lower_rank`` for every rank."""
    ranks = range(schedule.num_ranks)
    return tuple(lower_rank(schedule, rank, forward_only=forward_only) for rank in ranks)


def lower_rank(schedule: Schedule, rank: int, *, forward_only: bool = False) -> Program:
    """What one rank runs, its communication included.

    A send follows the action that makes the message. A receive stands before the first action that
    needs it, with all that the same peer has sent before: per directed edge between two ranks,
    sends and receives have one order, and first in, first out is all that a transport has to keep.
    As a schedule that validates ends with receives that block, an executor may post them ahead.

    Args:
        schedule: a schedule that ``validate`` accepts.
        rank: whose program.
        forward_only: leave out everything but the forwards; their order stays.

    Returns:
        Computes, Overlaps and Transfers in the order in which they run.
    """
    placement, num_stages = schedule.placement, schedule.num_stages
    inboxes: dict[int, deque[Compute]] = {}
    received: set[Compute] = set()
    program: list[Action | Transfer] = []

    def receive(wanted: tuple[Compute, ...]) -> None:
        peer = placement.rank_of(wanted[0].stage, wanted[0].mb)
        if peer == rank or not received.isdisjoint(wanted):
            return
        if peer not in inboxes:
            inboxes[peer] = deque(
                of for of, to in _sent(schedule, peer, forward_only) if to == rank
            )
        inbox = inboxes[peer]
        while received.isdisjoint(wanted):
            assert inbox, f"rank {peer} never sends {wanted[0]}: validate the schedule first"
            received.add(inbox[0])
            program.append(Transfer("recv", inbox.popleft(), peer))

    for action in _kept(schedule, rank, forward_only):
        for compute in parts(action):
            for wanted in inputs_of(compute, num_stages):
                receive(wanted)
        program.append(action)
        for compute in parts(action):
            peer = _receiver(schedule, compute)
            if peer not in (None, rank):
                program.append(Transfer("send", compute, peer))
    assert not any(inboxes.values()), f"rank {rank} never needs {inboxes}"
    return tuple(program)


def _kept(schedule: Schedule, rank: int, forward_only: bool) -> Iterator[Action]:
    for action in schedule.ranks[rank]:
        if not forward_only:
            yield action
        elif isinstance(action, Overlap):
            yield action.fwd
        elif action.op is Op.F:
            yield action


def _sent(
    schedule: Schedule, rank: int, forward_only: bool
) -> Iterator[tuple[Compute, int | None]]:
    """What ``rank`` makes, in order, and which rank needs it."""
    for action in _kept(schedule, rank, forward_only):
        for compute in parts(action):
            yield compute, _receiver(schedule, compute)


def _receiver(schedule: Schedule, compute: Compute) -> int | None:
    stage = message_of(compute, schedule.num_stages)
    return None if stage is None else schedule.placement.rank_of(stage, compute.mb)
