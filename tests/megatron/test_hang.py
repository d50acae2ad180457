"""A rank that stalls is named, with its action and who waits for it, within the timeout."""

import json
import re
import time
from pathlib import Path

import pytest
from helpers import training
from helpers.pool import WorkerPool

from mhc_megatron.launch.cli import main
from mhc_megatron.pipeline.actions import Compute, Op
from mhc_megatron.report.heartbeat import read_beats
from mhc_megatron.training.config import DataConfig, ModelConfig, ParallelConfig, TrainConfig
from mhc_megatron.training.heartbeat import Heartbeat, prepare_heartbeats

SECONDS = 6.0


@pytest.mark.parametrize(
    ("receiving", "doing"),
    [
        pytest.param(False, "1F0", id="in an action"),
        # Rank 0 has done its part: it is not for rank 0 that rank 1 waits.
        pytest.param(True, "recv 0F0 from 0", id="in a receive", marks=pytest.mark.one_core),
    ],
)
def test_a_stalled_rank_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], receiving: bool, doing: str
) -> None:
    train, valid = training.corpus(tmp_path)
    config = TrainConfig(
        model=ModelConfig(
            num_layers=4, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, seq_length=32
        ),
        parallel=ParallelConfig(pipeline=2, schedule="zb_h1"),
        data=DataConfig(train=train, valid=valid),
        steps=3,
        micro_batch_size=1,
        global_batch_size=2,
        timeout_minutes=SECONDS / 60,
        out=str(tmp_path / "run"),
    )
    out = Path(config.out)
    pool = WorkerPool(2)
    failures = pool.failures(training.stall_in_a_step, 2, config, 1, receiving, expected=1)
    # Two micro-batches a step: the third forward of the last stage is the first of step 2.
    left = ", which has left there," if receiving else ""
    named = (
        rf"HangError: stalled or gone: rank 1 \(\S+\) at {doing}{left} of step 2 for (\d+\.\d) s; "
        r"rank 0 waits for it\n"
    )
    found = re.search(named, failures[0])
    assert found, failures[0]
    assert SECONDS - 1 <= float(found[1]) < SECONDS + 20
    assert "ExecutionError: pipeline rank 0 failed at recv 1" in failures[0]

    assert [beat.doing for beat in read_beats(out)][1] == doing
    assert (out / "heartbeat" / "hang.txt").read_text().startswith("stalled or gone: rank 1 ")
    run = json.loads((out / "run.json").read_text())
    assert run["status"] == "failed" and "rank 1" in run["error"]
    assert main(["status", str(out)]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"^1 +\S+ +2 +{doing} +\d+\.\d s  -$", shown, re.MULTILINE), shown
    assert re.search(r"^0 +\S+ +2 +recv 1[IB]0 from 1 +\d+\.\d s  1$", shown, re.MULTILINE), shown


def test_a_beat_costs_little(tmp_path: Path) -> None:
    prepare_heartbeats(tmp_path)
    heartbeat, action = Heartbeat(tmp_path, rank=0), Compute(Op.F, 1, 2)
    start = time.process_time()
    for _ in range(1000):
        heartbeat.item(action)
    # About 20 us; the limit leaves room for a busy machine. An action takes milliseconds.
    assert (time.process_time() - start) / 1000 < 200e-6
