"""A rank is killed with SIGKILL, in any phase: it is named, none hangs, no saved step is lost."""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import pytest
from helpers import training
from helpers.pool import WorkerPool

from mhc_megatron.launch.local import launch_local
from mhc_megatron.training.config import DataConfig, ModelConfig, ParallelConfig, TrainConfig
from mhc_megatron.training.overrides import to_dict


@pytest.mark.one_core
def test_a_rank_killed_in_any_phase_is_named_and_costs_no_saved_step(
    workers: WorkerPool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    train, valid = training.corpus(tmp_path)
    config = TrainConfig(
        model=ModelConfig(
            num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, seq_length=32
        ),
        parallel=ParallelConfig(data=2, distributed_optimizer=True),
        data=DataConfig(train=train, valid=valid),
        steps=4,
        micro_batch_size=2,
        global_batch_size=4,
        eval_interval=0,
        eval_iters=1,
        save_interval=1,
        out=str(tmp_path / "run"),
    )
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    losses = workers.run(training.spoil_steps, 2, whole, {})[0][0]
    assert list(losses) == [1, 2, 3, 4]

    file, checkpoints = tmp_path / "config.json", Path(config.out) / "checkpoints"
    file.write_text(json.dumps(to_dict(config)))
    tests = str(Path(training.__file__).parents[1])
    path = os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    # In step 2, while step 2 is saved, and while the checkpoint of step 1 is loaded. Rank 0 removes
    # what it wrote when it notices that rank 1 is gone, unless the launcher ends it before that.
    partial = {".partial-step_00000002"}
    for phase, may_be_left in (("step", set()), ("save", partial), ("load", partial)):
        start = time.monotonic()
        status = launch_local("helpers.killed", [str(file), "1", phase], num_processes=2)
        assert time.monotonic() - start < 300  # timeout_minutes is 10: nobody waited for it
        assert status == 128 + signal.SIGKILL
        assert "[rank 1] failed first: killed by SIGKILL" in capfd.readouterr().err
        found = {folder.name for folder in checkpoints.iterdir()}
        assert {"step_00000001"} <= found <= {"step_00000001"} | may_be_left

    assert workers.run(training.spoil_steps, 2, config, {})[0] == (losses, "")
