"""Bubbles and peaks against published formulas, without a tolerance: all times are integers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_megatron.pipeline.catalogue import CATALOGUE, generate
from mhc_megatron.pipeline.costs import Costs, StageCosts
from mhc_megatron.pipeline.simulate import simulate
from mhc_megatron.pipeline.timeline import Timeline

RANKS = (2, 4, 8, 16)
MULTIPLES = (2, 3, 5)  # micro-batches per rank
SPLIT = ("zb_h1", "dualpipe_v", "dualpipe")
SIMPLE = tuple(name for name in CATALOGUE if name not in SPLIT)


def _timeline(name: str, num_ranks: int, num_mb: int, costs: StageCosts) -> Timeline:
    schedule = generate(name, num_ranks=num_ranks, num_mb=num_mb)
    return simulate(schedule, Costs(default=costs))


def _bubble(name: str, num_ranks: int, forward: int, wgrad: int, backward: int, pair: int) -> int:
    """The published formula, with PP for the number of stages as DualPipe's README counts them."""
    if name in SIMPLE:
        return (num_ranks - 1) * (forward + backward)
    if name == "zb_h1":
        return (num_ranks - 1) * (forward + backward - 2 * wgrad)
    pp = 2 * num_ranks if name == "dualpipe_v" else num_ranks
    return (pp // 2 - 1) * (pair + backward - 3 * wgrad)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpipe", (3, 9, 21, 45)),
        ("one_f_one_b", (3, 9, 21, 45)),
        ("interleaved", (3, 9, 21, 45)),
        ("zb_h1", (1, 3, 7, 15)),
        ("dualpipe", (0, 2, 6, 14)),
        ("dualpipe_v", (2, 6, 14, 30)),
    ],
)
def test_bubbles_where_everything_takes_one(name: str, expected: tuple[int, ...]) -> None:
    for multiple in MULTIPLES:
        timelines = [
            _timeline(name, p, multiple * p + multiple * p % 2, StageCosts()) for p in (4, 8, 16)
        ]
        timelines.insert(0, _timeline(name, 2, 2 * multiple, StageCosts()))
        assert tuple(t.makespan - max(t.busy) for t in timelines) == expected
        assert all(set(t.bubble) == {bubble} for t, bubble in zip(timelines, expected, strict=True))


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("name", SIMPLE)
@given(times=st.tuples(*[st.integers(1, 50)] * 3), multiple=st.sampled_from(MULTIPLES))
@settings(deadline=None, max_examples=15, derandomize=True)
def test_one_direction_at_any_cost(
    name: str, num_ranks: int, times: tuple[int, int, int], multiple: int
) -> None:
    forward, dgrad, wgrad = times
    costs = StageCosts(forward=forward, dgrad=dgrad, wgrad=wgrad)
    timeline = _timeline(name, num_ranks, multiple * num_ranks, costs)
    bubble = _bubble(name, num_ranks, forward, wgrad, dgrad + wgrad, 0)
    assert timeline.bubble == [bubble] * num_ranks


@pytest.mark.parametrize("num_ranks", RANKS)
@given(data=st.data(), multiple=st.sampled_from(MULTIPLES))
@settings(deadline=None, max_examples=15, derandomize=True)
def test_zb_h1_where_a_wgrad_is_no_longer_than_the_others(
    num_ranks: int, data: st.DataObject, multiple: int
) -> None:
    wgrad = data.draw(st.integers(0, 40))
    forward, dgrad = (wgrad + data.draw(st.integers(0, 40)) for _ in range(2))
    costs = StageCosts(forward=forward, dgrad=dgrad, wgrad=wgrad)
    timeline = _timeline("zb_h1", num_ranks, multiple * num_ranks, costs)
    bubble = _bubble("zb_h1", num_ranks, forward, wgrad, dgrad + wgrad, 0)
    assert timeline.bubble == [bubble] * num_ranks


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("name", ["dualpipe", "dualpipe_v"])
@given(data=st.data(), multiple=st.sampled_from((2, 4)))
@settings(deadline=None, max_examples=15, derandomize=True)
def test_dualpipe_with_a_dgrad_as_long_as_a_forward(
    name: str, num_ranks: int, data: st.DataObject, multiple: int
) -> None:
    wgrad = data.draw(st.integers(0, 40))
    forward = wgrad + data.draw(st.integers(1, 40))
    backward = forward + wgrad
    pair = data.draw(st.integers(backward, forward + backward))
    costs = StageCosts(forward=forward, dgrad=forward, wgrad=wgrad, overlap=pair)
    timeline = _timeline(name, num_ranks, multiple * num_ranks, costs)
    bubble = _bubble(name, num_ranks, forward, wgrad, backward, pair)
    # Ranks whose micro-batches overlap more often wait less: it is the largest bubble.
    assert max(timeline.bubble) == bubble
    if pair == forward + backward:
        assert timeline.bubble == [bubble] * num_ranks


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("name", ["dualpipe", "dualpipe_v"])
@given(data=st.data())
@settings(deadline=None, max_examples=15, derandomize=True)
def test_dualpipe_in_terms_of_its_forward(name: str, num_ranks: int, data: st.DataObject) -> None:
    """The published formula sets I = F. Below that, F&B + F - 2W is what remains exact."""
    wgrad = data.draw(st.integers(0, 40))
    dgrad = wgrad + data.draw(st.integers(1, 40))
    forward = dgrad + data.draw(st.integers(0, 40))
    pair = data.draw(st.integers(max(forward, dgrad + wgrad), forward + dgrad + wgrad))
    costs = StageCosts(forward=forward, dgrad=dgrad, wgrad=wgrad, overlap=pair)
    timeline = _timeline(name, num_ranks, 2 * num_ranks, costs)
    depth = num_ranks if name == "dualpipe_v" else num_ranks // 2
    assert max(timeline.bubble) == (depth - 1) * (pair + forward - 2 * wgrad)


@pytest.mark.parametrize("multiple", [2, 4])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_peak_live_micro_batches(num_ranks: int, multiple: int) -> None:
    num_mb = multiple * num_ranks
    ranks = range(num_ranks)
    expected = {
        "gpipe": [num_mb] * num_ranks,
        "one_f_one_b": [num_ranks - rank for rank in ranks],
        # Two chunks: Megatron's warm-up of 2(P-1-r) + P forwards, and the one under way.
        "interleaved": [2 * (num_ranks - 1 - rank) + num_ranks + 1 for rank in ranks],
        "zb_h1": [num_ranks] * num_ranks,
        "dualpipe": [num_ranks + 1] * num_ranks,
        "dualpipe_v": [2 * num_ranks + 1] * num_ranks,
    }
    for name, peaks in expected.items():
        assert _timeline(name, num_ranks, num_mb, StageCosts()).peak_live.tolist() == peaks


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 4])
@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_interleaved_with_any_number_of_chunks(num_ranks: int, num_chunks: int) -> None:
    for num_mb in (num_ranks, 4 * num_ranks):
        timeline = simulate(
            generate("interleaved", num_ranks=num_ranks, num_mb=num_mb, num_chunks=num_chunks)
        )
        assert timeline.bubble == [3 * (num_ranks - 1)] * num_ranks
        fill = (num_chunks - 1) * num_ranks
        ahead = [2 * (num_ranks - 1 - rank) + fill for rank in range(num_ranks)]
        assert timeline.peak_live.tolist() == [min(n + 1, num_mb * num_chunks) for n in ahead]


@pytest.mark.parametrize("num_mb", [1, 2, 3, 7])
def test_fewer_micro_batches_than_ranks(num_mb: int) -> None:
    for name in ("gpipe", "one_f_one_b"):
        assert _timeline(name, 8, num_mb, StageCosts()).bubble == [21] * 8
    # Without a micro-batch for every rank there are not enough weight gradients to fill the end.
    assert max(_timeline("zb_h1", 8, num_mb, StageCosts()).bubble) == 7 + 8 - num_mb
