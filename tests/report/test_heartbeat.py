"""Who is stalled and who waits for whom, from the ranks' last signs of life."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mhc_megatron.errors import UserError
from mhc_megatron.launch.cli import main
from mhc_megatron.pipeline.actions import Compute, Op, Transfer
from mhc_megatron.pipeline.transport import TransferError
from mhc_megatron.report import heartbeat
from mhc_megatron.report.heartbeat import (
    BEAT_BYTES,
    FINISHED,
    Beat,
    beat_file,
    describe,
    read_beats,
    stalled,
    summary,
    table,
)
from mhc_megatron.training.heartbeat import HangError, Heartbeat, hang_report, prepare_heartbeats


def beat(rank: int, doing: str, waits_for: Any = None, *, phase: int = 5, time: float = 90) -> Beat:
    return Beat(
        rank=rank, host="n0", step=2, phase=phase, doing=doing, waits_for=waits_for, time=time
    )


# Rank 2 computes, 1 waits for it, 0 for 1; another pipeline, 3 to 5, is done and waits for all.
CHAIN = [
    beat(0, "recv 1B0 from 1", 1),
    beat(1, "recv 2B0 from 2", 2),
    beat(2, "2B0", time=87.5),
    *[beat(rank, "end of the pipeline", "all", phase=6) for rank in (3, 4, 5)],
]


@pytest.mark.parametrize(
    ("beats", "ranks"),
    [
        pytest.param(CHAIN, [2], id="chain"),
        pytest.param([beat(0, "1F3"), beat(1, "1F3", time=80)], [1, 0], id="tensor_parallel"),
        pytest.param(
            [beat(0, "optimizer", "all"), beat(1, "reads data", phase=6)], [0], id="slow_to_leave"
        ),
        pytest.param(
            [beat(0, "recv 1B0 from 1", 1), beat(1, "recv 0F0 from 0", 0, time=80)],
            [1],
            id="circle",
        ),
    ],
)
def test_the_stalled_rank_is_the_one_that_waits_for_nobody(
    beats: list[Beat], ranks: list[int]
) -> None:
    assert [found.rank for found in stalled(beats)] == ranks


def test_the_report_names_rank_action_time_and_who_waits() -> None:
    assert summary(CHAIN, now=100) == (
        "stalled or gone: rank 2 (n0) at 2B0 of step 2 for 12.5 s; ranks 0, 1, 3, 4, 5 wait for it"
        ": 0 for 1 for 2"
    )
    assert table(CHAIN[:4], now=100).splitlines() == [
        "rank  node  step  doing                for     waits for rank",
        "2     n0    2     2B0                  12.5 s  -",
        "0     n0    2     recv 1B0 from 1      10.0 s  1",
        "1     n0    2     recv 2B0 from 2      10.0 s  2",
        "3     n0    2     end of the pipeline  10.0 s  0, 1, 2",
    ]


def test_a_rank_that_stalls_in_a_receive_is_told_from_one_that_waits() -> None:
    """Rank 1 needs the second message of rank 2, which has sent one; or two."""
    first, last = beat(0, "recv 1B0 from 1", 1), beat(2, "recv 1F3 from 1", 1, time=85)
    middle = dataclasses.replace(beat(1, "recv 2B1 from 2", 2), awaits=2)
    one, two = (dataclasses.replace(last, sent={1: count, 3: 9}) for count in (1, 2))
    assert summary([first, middle, one], now=100) == (
        "ranks wait for each other in a circle, 1 for 2 for 1; longest silent: rank 2 (n0) at "
        "recv 1F3 from 1 of step 2 for 15.0 s"
    )
    assert summary([first, middle, two], now=100) == (
        "stalled or gone: rank 1 (n0) at recv 2B1 from 2, which has left there, of step 2 for "
        "10.0 s; ranks 0, 2 wait for it"
    )
    assert table([first, middle, two], now=100).splitlines()[1].endswith("10.0 s  -")


def test_a_circle_may_hold_a_rank_that_waits_for_all() -> None:
    beats = [beat(0, "recv 1B0 from 1", 1), beat(1, "end of the pipeline", "all", phase=6, time=80)]
    assert summary(beats, now=100).startswith(
        "ranks wait for each other in a circle, 0 for 1 for 0; longest silent: rank 1 (n0) at end"
    )


def test_a_long_chain_is_cut_in_the_middle() -> None:
    beats = [beat(rank, "recv", rank + 1) for rank in range(30)] + [beat(30, "30F0")]
    assert summary(beats, now=100).endswith(
        " wait for it: 0 for 1 for 2 for 3 for ... for 27 for 28 for 29 for 30"
    )


def test_a_beat_is_one_small_file_that_is_overwritten(tmp_path: Path) -> None:
    prepare_heartbeats(tmp_path)
    writer = Heartbeat(tmp_path, rank=3)
    writer.pipeline = [3, 7]
    writer.begin("forward and backward", step=4)
    writer.item(Transfer("recv", Compute(Op.F, 1, 2), 1))
    [found] = read_beats(tmp_path)
    assert (found.rank, found.step, found.doing, found.waits_for) == (3, 4, "recv 1F2 from 1", 7)
    writer.item(Compute(Op.F, 2, 2))
    writer.item(Transfer("send", Compute(Op.F, 2, 2), 1))  # does not wait
    [found] = read_beats(tmp_path)
    assert (found.doing, found.waits_for, found.sent) == ("2F2", None, {})
    writer.item(Transfer("recv", Compute(Op.F, 1, 3), 1))
    [found] = read_beats(tmp_path)
    assert (found.waits_for, found.awaits, found.sent) == (7, 2, {7: 1})
    before = found.phase
    writer.item(None)
    [found] = read_beats(tmp_path)
    assert (found.phase, found.waits_for) == (before + 1, "all")
    assert beat_file(tmp_path, 3).stat().st_size == BEAT_BYTES
    prepare_heartbeats(tmp_path)
    assert read_beats(tmp_path) == []


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as refused:
        prepare_heartbeats(tmp_path / "file")
    assert str(refused.value) == (
        f"cannot write to out={str(tmp_path / 'file')!r}: Not a directory; choose a folder that "
        "can be written"
    )


def write(folder: Path, beats: list[Beat]) -> None:
    prepare_heartbeats(folder)
    for one in beats:
        beat_file(folder, one.rank).write_bytes(heartbeat.encode(one))


def test_the_first_failed_rank_writes_the_table_and_all_name_the_stalled(tmp_path: Path) -> None:
    write(tmp_path, CHAIN)
    for rows in (7, 0):
        with pytest.raises(HangError, match="at 2B0") as hang, hang_report(tmp_path):
            raise RuntimeError("at recv 2B0 from 2") from TransferError("timed out")
        assert len(str(hang.value).splitlines()) == 1 + rows
        assert str(hang.value).startswith("stalled or gone: rank 2 (n0) at 2B0")
        assert isinstance(hang.value.__cause__, RuntimeError)
    assert "2B0" in (tmp_path / "heartbeat" / "hang.txt").read_text()


def test_an_error_of_the_ranks_own_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^out of memory$"), hang_report(tmp_path):
        raise RuntimeError("out of memory")


def test_status_shows_a_run_without_a_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, CHAIN)
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "loss": 2.0, "step_ms": 5.0}) + "\n"
    )
    assert main(["status", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path}: step 1, loss 2.0000, 5 ms\nrank  node  step  doing")
    assert "s; stalled or gone: rank 2 (n0) at 2B0 of step 2" in out  # silent since 1970


def test_a_live_and_a_finished_run_have_no_verdict(tmp_path: Path) -> None:
    write(tmp_path, CHAIN)
    assert describe(tmp_path, now=100) == table(CHAIN, now=100)
    write(tmp_path, [beat(0, FINISHED), beat(1, FINISHED)])
    assert describe(tmp_path, now=1e9) == ""
