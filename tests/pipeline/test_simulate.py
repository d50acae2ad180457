"""Times, bubbles and bytes."""

import time

import pytest
from helpers.schedules import costs, schedules, slow_ends
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_megatron.pipeline.catalogue import generate
from mhc_megatron.pipeline.costs import Costs, StageCosts
from mhc_megatron.pipeline.errors import Deadlock
from mhc_megatron.pipeline.recompute import place_recompute
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.simulate import simulate
from mhc_megatron.pipeline.text import from_csv


@given(schedules(), st.data())
@settings(deadline=None, max_examples=100, derandomize=True)
def test_every_end_is_the_definitions(schedule: Schedule, data: st.DataObject) -> None:
    chosen = data.draw(costs(schedule.num_stages))
    timeline = simulate(schedule, chosen)
    expected = slow_ends(schedule, chosen)
    for rank, ends in enumerate(expected):
        spans = list(timeline.spans(rank))
        assert [span.end for span in spans] == ends
        assert [span.action for span in spans] == list(schedule.ranks[rank])
        assert timeline.busy[rank] == sum(span.end - span.start for span in spans)
    assert timeline.makespan == max(ends[-1] for ends in expected)
    assert isinstance(timeline.makespan, int)


def test_messages_take_latency_and_bytes_over_bandwidth() -> None:
    schedule = generate("gpipe", num_ranks=3, num_mb=1)
    # Three forwards, three backwards of 2, and four messages.
    assert simulate(schedule, Costs(latency=10)).makespan == 9 + 4 * 10
    network = Costs(latency=10, message_bytes=600, bandwidth=200)
    assert simulate(schedule, network).makespan == 9 + 4 * 13.0
    assert simulate(schedule, Costs(message_bytes=600)).makespan == 9


def test_within_a_rank_nothing_is_sent() -> None:
    """The turn of a V: stages 1 and 2 are on rank 1."""
    schedule = from_csv("0F0,3F0,3B0,0B0\n1F0,2F0,2B0,1B0\n")
    assert schedule.placement.ranks == (0, 1, 1, 0)
    assert simulate(schedule, Costs(latency=10)).makespan == 12 + 4 * 10


def test_heterogeneous_stages() -> None:
    schedule = generate("gpipe", num_ranks=2, num_mb=2)
    slow_last = Costs(stages={-1: StageCosts(forward=5, dgrad=3, wgrad=4)})
    timeline = simulate(schedule, slow_last)
    assert [(s.start, s.end) for s in timeline.spans(1)] == [(1, 6), (6, 11), (11, 18), (18, 25)]
    assert timeline.makespan == 27
    assert timeline.bubble == [27 - 6, 27 - 24]
    assert timeline.bubble_fraction == (21 + 3) / (2 * 27)


def test_a_rebuild_runs_while_the_gradient_is_on_its_way() -> None:
    schedule = generate("one_f_one_b", num_ranks=2, num_mb=1)
    each = Costs(default=StageCosts(recompute=1))
    inside, apart = simulate(schedule, each), simulate(place_recompute(schedule), each)
    assert inside.makespan == 2 + 2 * 3
    assert apart.makespan == 2 + 3 + 2
    assert apart.busy == inside.busy
    assert str(place_recompute(schedule).ranks[0]) == "Row(0F0, 0R0, 0B0)"


def test_a_rebuild_stands_before_the_overlap_of_its_backward() -> None:
    row = place_recompute(generate("dualpipe_v", num_ranks=1, num_mb=3)).ranks[0]
    assert [str(action) for action in row] == [
        "0F0", "1F0", "0F1", "1R0", "1B0", "0R0", "(1F1;0B0)", "1R1", "(0F2;1B1)", "0R1",
        "(1F2;0B1)", "1R2", "1B2", "0R2", "0I2", "0W2",
    ]  # fmt: skip


def test_bytes_follow_the_order() -> None:
    """F holds 100; the rebuild adds 7 until the backward ends; I leaves 60 for W."""
    stage = StageCosts(held_bytes=100, rebuilt_bytes=7, wgrad_bytes=60)
    for text, peak in {
        "0F0,0B0,0F1,0B1": 107,
        "0F0,0F1,0B0,0B1": 207,
        "0F0,0I0,0W0,0F1,0I1,0W1": 107,
        "0F0,0I0,0F1,0I1,0W0,0W1": 167,
        "0F0,0F1,0R0,0R1,0B0,0B1": 214,
        "0F0,(0F1;0B0)OVERLAP_F_B,0B1": 207,
    }.items():
        timeline = simulate(from_csv(text), Costs(default=stage))
        assert timeline.peak_bytes.tolist() == [peak], text
    split = StageCosts(
        held_bytes=100, rebuilt_bytes=7, split_rebuilt_bytes=20, wgrad_rebuilt_bytes=15
    )
    for text, peak in {
        "0F0,0B0,0F1,0I1,0W1": 120,
        "0F0,0B0,0F1,0B1": 107,
        "0F0,0I0,0F1,0B1,0W0": 115 + 107,
        "0F0,0I0,0F1,0I1,0W0,0W1": 115 + 120,
        "0F0,0F1,0R1,0I0,0W0,0I1,0W1": 200 + 2 * 20,
    }.items():
        timeline = simulate(from_csv(text), Costs(default=split))
        assert timeline.peak_bytes.tolist() == [peak], text
    whole = StageCosts(held_bytes=100, rebuilt_bytes=7)
    split = from_csv("0F0,0I0,0F1,0I1,0W0,0W1")
    assert simulate(split, Costs(default=whole)).peak_bytes.tolist() == [207]
    assert simulate(split).peak_live.tolist() == [2]


def test_bytes_of_different_stages() -> None:
    costs = Costs(stages={0: StageCosts(held_bytes=1000), 7: StageCosts(held_bytes=50)})
    timeline = simulate(generate("dualpipe_v", num_ranks=4, num_mb=8), costs)
    assert timeline.peak_bytes.tolist()[1:] == [0, 0, 0]
    assert timeline.peak_bytes[0] % 50 == 0 and timeline.peak_bytes[0] >= 1000


def test_a_deadlock_is_reported_without_validation() -> None:
    with pytest.raises(Deadlock, match="csv: deadlock: rank 0 at 0B0 waits for 1B0; rank 1 at 1B0"):
        simulate(from_csv("0F0,0B0\n1B0,1F0\n"))
    with pytest.raises(Deadlock) as caught:
        simulate(from_csv("0F0,0B0\n1F0\n"))
    assert [(rank, str(action)) for rank, action, _ in caught.value.stuck] == [(0, "0B0")]


def test_a_thousand_ranks_and_micro_batches_take_seconds() -> None:
    """About 4 s on an ordinary core; the bound catches what is linear in Python objects."""
    begin = time.process_time()
    schedule = generate("one_f_one_b", num_ranks=1024, num_mb=2048)
    timeline = simulate(schedule)
    assert schedule.num_actions == 2 * 1024 * 2048
    assert timeline.makespan == 3 * (2048 + 1023)
    assert timeline.peak_live.max() == 1024
    assert time.process_time() - begin < 30
