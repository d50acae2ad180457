"""The generators: known tables, and what they refuse."""

from pathlib import Path

import pytest

from mhc_megatron.pipeline.actions import Compute, Op, Overlap
from mhc_megatron.pipeline.catalogue import CATALOGUE, generate, num_actions
from mhc_megatron.pipeline.dual import dualpipe_v
from mhc_megatron.pipeline.errors import ScheduleError
from mhc_megatron.pipeline.rows import Row
from mhc_megatron.pipeline.text import to_csv

TABLES = Path(__file__).parent / "tables"


def test_dualpipe_v_is_the_published_table() -> None:
    """The table of facts that PyTorch publishes for its ScheduleDualPipeV, action for action:
    test/distributed/pipelining/artifacts/dualpipev_4rank_10mb.csv."""
    expected = (TABLES / "dualpipe_v_4x10.csv").read_text()
    assert to_csv(dualpipe_v(4, 10)) == expected


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 9])
@pytest.mark.parametrize("name", CATALOGUE)
def test_the_number_of_actions_is_known_before(name: str, num_ranks: int) -> None:
    num_ranks += num_ranks % 2 if name == "dualpipe" else 0
    for num_mb in (2 * num_ranks, 4 * num_ranks):
        for num_chunks in (None, 1, 3) if name == "interleaved" else (None,):
            numbers = {"num_ranks": num_ranks, "num_mb": num_mb, "num_chunks": num_chunks}
            assert num_actions(name, **numbers) == generate(name, **numbers).num_actions


@pytest.mark.parametrize("name", CATALOGUE)
def test_small_tables(name: str) -> None:
    """Written by ``to_csv``, read by people; a change of a schedule has to be meant."""
    schedule = generate(name, num_ranks=2, num_mb=4)
    assert to_csv(schedule) == (TABLES / f"{name}_2x4.csv").read_text()


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        ("gpipe", (0, 4), "num_ranks=0 must be at least 1"),
        ("one_f_one_b", (4, 0), "num_mb=0 must be at least 1"),
        ("zb_h1", (-1, 4), "num_ranks=-1 must be at least 1"),
        ("dualpipe_v", (0, 4), "num_ranks=0 must be at least 1"),
        ("dualpipe", (0, 4), "num_ranks=0 must be at least 1"),
        ("interleaved", (0, 4), "num_ranks=0 must be at least 1"),
        (
            "interleaved",
            (4, 6),
            "num_mb=6 is not a multiple of num_ranks=4, which interleaved needs; take 8 or 4, "
            "or one_f_one_b",
        ),
        (
            "interleaved",
            (4, 3),
            "num_mb=3 is not a multiple of num_ranks=4, which interleaved needs; take 4, "
            "or one_f_one_b",
        ),
        (
            "dualpipe_v",
            (4, 6),
            "num_mb=6 is below 2*num_ranks=8, which dualpipe_v needs; take more micro-batches, "
            "or one_f_one_b",
        ),
        (
            "dualpipe",
            (4, 6),
            "num_mb=6 is below 2*num_ranks=8, which dualpipe needs; take more micro-batches, "
            "or one_f_one_b",
        ),
        (
            "dualpipe",
            (3, 8),
            "num_ranks=3 is odd, and dualpipe has two directions; take 4, or dualpipe_v",
        ),
        (
            "dualpipe",
            (4, 9),
            "num_mb=9 is odd, and dualpipe has two directions; take 10, or dualpipe_v",
        ),
        (
            "1f1b",
            (4, 9),
            "unknown schedule '1f1b'; known: gpipe, one_f_one_b, interleaved, zb_h1, dualpipe_v, "
            "dualpipe",
        ),
        (
            "gpipe",
            (2, 1 << 25),
            "num_mb=33554432 with 2 stages is above the limits of 16777216 micro-batches and "
            "16777216 stages; take a smaller step",
        ),
    ],
)
def test_refusals(name: str, numbers: tuple[int, int], message: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        generate(name, num_ranks=numbers[0], num_mb=numbers[1])
    assert str(caught.value) == message


def test_chunks_are_for_interleaved() -> None:
    assert generate("interleaved", num_ranks=2, num_mb=4, num_chunks=3).num_stages == 6
    with pytest.raises(ScheduleError, match="num_chunks=3 is for interleaved"):
        generate("gpipe", num_ranks=2, num_mb=4, num_chunks=3)
    with pytest.raises(ScheduleError, match="num_chunks=0 must be at least 1"):
        generate("interleaved", num_ranks=2, num_mb=4, num_chunks=0)


def test_which_stages_a_rank_holds() -> None:
    numbers = {"num_ranks": 4, "num_mb": 8}
    held = {name: generate(name, **numbers).placement.stages_on(1) for name in CATALOGUE}
    assert held == {
        "gpipe": (1,),
        "one_f_one_b": (1,),
        "interleaved": (1, 5),
        "zb_h1": (1,),
        "dualpipe_v": (1, 6),
        "dualpipe": (1, 2),
    }


def test_a_row_is_its_actions() -> None:
    actions = [
        Compute(Op.F, 0, 0),
        Overlap(Compute(Op.F, 0, 1), Compute(Op.B, 3, 0)),
        Compute(Op.W, 2, 70_000),
    ]
    row = Row(actions)
    assert list(row) == actions
    assert len(row) == 3
    assert actions[1] in row and Compute(Op.F, 0, 1) not in row
    assert row == Row(list(row)) and hash(row) == hash(Row(actions))
    assert row != Row(actions[:2]) and row != actions
    assert repr(row) == "Row(0F0, (0F1;3B0), 2W70000)"
    assert len(Row([])) == 0
