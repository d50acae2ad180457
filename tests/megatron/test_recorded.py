"""``profile_step`` leaves a trace per rank, with the actions of its pipeline, and every bit."""

import dataclasses
import gzip
import json
from pathlib import Path

import pytest
from helpers import training
from helpers.pool import WorkerPool

from mhc_megatron.errors import UserError
from mhc_megatron.launch import cli
from mhc_megatron.training.config import DataConfig, ModelConfig, ParallelConfig, TrainConfig
from mhc_megatron.training.recorded import trace_file


@pytest.mark.one_core
def test_every_rank_records_the_step(
    workers: WorkerPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, valid = training.corpus(tmp_path)
    config = TrainConfig(
        model=ModelConfig(
            num_layers=4, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, seq_length=16
        ),
        parallel=ParallelConfig(pipeline=2, schedule="dualpipe_v"),
        data=DataConfig(train=train, valid=valid),
        steps=3,
        micro_batch_size=1,
        global_batch_size=4,
        eval_interval=0,
        out=str(tmp_path / "plain"),
    )
    recorded = dataclasses.replace(config, profile_step=2, out=str(tmp_path / "recorded"))
    plain = workers.run(training.spoil_steps, 2, config, {})[0]
    assert workers.run(training.spoil_steps, 2, recorded, {})[0] == plain
    assert not (tmp_path / "plain" / "traces").exists()

    files = [trace_file(Path(recorded.out), 2, rank) for rank in range(2)]
    assert sorted((tmp_path / "recorded" / "traces").iterdir()) == files
    for file, actions in zip(files, [{"0F0", "3F0"}, {"1F0", "2F0"}], strict=True):
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        names = [event.get("name") for event in events]
        assert all(names.count(action) == 1 for action in actions), "one step, and its own actions"
    assert cli.main(["trace", str(files[0])]) == 2
    assert "GPU" in capsys.readouterr().err


def test_a_step_that_is_none_is_refused() -> None:
    for wrong in (-1, 4):
        with pytest.raises(UserError, match=f"profile_step={wrong} is none of the steps 1 to 3"):
            TrainConfig(steps=3, profile_step=wrong)
