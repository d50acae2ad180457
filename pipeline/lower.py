"""From computes to programs: add the sends and receives that a schedule implies."""

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Iterator

from mhc_megatron.pipeline.actions import Action, Compute, Op, Transfer, parts
from mhc_megatron.pipeline.costs import Costs, Number, StageCosts
from mhc_megatron.pipeline.dataflow import edges_of, inputs_of, message_of
from mhc_megatron.pipeline.rows import Row
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.simulate import simulate
from mhc_megatron.pipeline.timeline import Timeline

Program = tuple[Action | Transfer, ...]

# Any costs would do, as long as everything takes some time.
_COSTS = Costs(default=StageCosts(forward=1, dgrad=1, wgrad=1, recompute=1))


def lower(schedule: Schedule, *, forward_only: bool = False) -> tuple[Program, ...]:
    """``lower_rank`` for every rank."""
    timeline = _timeline(schedule, forward_only)
    return tuple(_program(timeline, rank) for rank in range(schedule.num_ranks))


def lower_rank(schedule: Schedule, rank: int, *, forward_only: bool = False) -> Program:
    """What one rank runs, its communication included.

    A send follows the action that makes the message. A receive stands before the first action that
    needs it, with all that the same peer has sent before: per directed edge between two ranks,
    sends and receives have one order, and first in, first out is all that a transport has to keep.

    A receive is posted ahead, but not before the peer, on paper, has sent the message: right
    before the first action that starts then or later. For a GPU may have to be idle before an
    action can run: loading a kernel for the first time waits for all that is under way, and so
    does returning memory. A receive that was posted for what a peer makes only after that very
    action would then be waited for forever. With these posts nobody is: of the ranks that are
    stuck take the one whose next action starts first on paper. All that it has posted was sent by
    actions that end before, and all that it has sent is posted by its peers before actions that
    start at that time or later; none of the stuck ranks has one before.

    Args:
        schedule: a schedule that ``validate`` accepts.
        rank: whose program.
        forward_only: leave out everything but the forwards; their order stays.

    Returns:
        Computes, Overlaps and Transfers in the order in which they run.

    Raises:
        Deadlock: the schedule cannot finish.
    """
    return _program(_timeline(schedule, forward_only), rank)


def _timeline(schedule: Schedule, forward_only: bool) -> Timeline:
    """The schedule on paper."""
    if forward_only:
        schedule = Schedule(
            name=schedule.name,
            placement=schedule.placement,
            num_mb=schedule.num_mb,
            ranks=tuple(Row(_forwards(row)) for row in schedule.ranks),
        )
    return simulate(schedule, _COSTS)


def _forwards(row: Row) -> Iterator[Compute]:
    for action in row:
        for compute in parts(action):
            if compute.op is Op.F:
                yield compute


def _program(timeline: Timeline, rank: int) -> Program:
    schedule = timeline.schedule
    placement, num_stages = schedule.placement, schedule.num_stages
    inboxes, posts = _incoming(timeline, rank)
    received: set[Compute] = set()
    program: list[Action | Transfer] = []

    def receive(wanted: tuple[Compute, ...]) -> None:
        peer = placement.rank_of(wanted[0].stage, wanted[0].mb)
        if peer == rank or not received.isdisjoint(wanted):
            return
        inbox = inboxes[peer]
        while received.isdisjoint(wanted):
            received.add(inbox[0])
            program.append(Transfer("recv", inbox.popleft(), peer))

    for index, action in enumerate(schedule.ranks[rank]):
        program += posts[index]
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


def _incoming(
    timeline: Timeline, rank: int
) -> tuple[dict[int, deque[Compute]], dict[int, list[Transfer]]]:
    """What each peer sends to ``rank``, in order; and the posts before each of its actions."""
    schedule = timeline.schedule
    starts = [span.start for span in timeline.spans(rank)]
    inboxes: dict[int, deque[Compute]] = defaultdict(deque)
    sent: list[tuple[Number, int, Compute]] = []
    for peer in (source for source, target in edges_of(schedule) if target == rank):
        for span in timeline.spans(peer):
            for compute in parts(span.action):
                if _receiver(schedule, compute) == rank:
                    inboxes[peer].append(compute)
                    sent.append((span.end, peer, compute))
    posts: dict[int, list[Transfer]] = defaultdict(list)
    for time, peer, compute in sorted(sent, key=lambda each: each[0]):
        posts[bisect_left(starts, time)].append(Transfer("post", compute, peer))
    return inboxes, posts


def _receiver(schedule: Schedule, compute: Compute) -> int | None:
    stage = message_of(compute, schedule.num_stages)
    return None if stage is None else schedule.placement.rank_of(stage, compute.mb)
