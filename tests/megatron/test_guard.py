"""A bad step is left out: the run goes back to its checkpoint and on, and loses nothing else."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers import training
from helpers.pool import WorkerPool

from mhc_megatron.training.config import DataConfig, ModelConfig, ParallelConfig, TrainConfig
from mhc_megatron.training.guard import GuardConfig


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    train, valid = training.corpus(tmp_path)
    return TrainConfig(
        model=ModelConfig(
            num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, seq_length=32
        ),
        data=DataConfig(train=train, valid=valid),
        guard=GuardConfig(max_rollbacks=2),
        steps=6,
        micro_batch_size=2,
        global_batch_size=4,
        eval_interval=0,
        eval_iters=1,
        save_interval=3,
        out=str(tmp_path / "run"),
    )


def run(
    workers: WorkerPool, config: TrainConfig, spoilt: dict[int, float], **changes: Any
) -> tuple[dict[int, float], str]:
    config = dataclasses.replace(config, **changes)
    results = workers.run(training.spoil_steps, config.parallel.world_size, config, spoilt)
    assert all(result == results[0] for result in results)
    return results[0]


def rollbacks(out: str) -> list[tuple[int, int, str]]:
    found = json.loads((Path(out) / "rollbacks.json").read_text())
    return [(one["step"], one["back_to"], one["problem"]) for one in found]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"data": 2, "distributed_optimizer": True}, id="dp2_distributed_optimizer"),
        pytest.param({"pipeline": 2, "schedule": "dualpipe_v"}, id="pp2_dualpipe_v"),
    ],
)
def test_an_injected_nan_costs_its_own_step_alone(
    layout: dict[str, Any], workers: WorkerPool, config: TrainConfig, tmp_path: Path
) -> None:
    parallel = ParallelConfig(**layout)
    changes = {"parallel": parallel, "micro_batch_size": 1 if parallel.pipeline > 1 else 2}
    if parallel.pipeline > 1:
        changes |= {"model": dataclasses.replace(config.model, num_layers=4)}
    # Rank 0 computes one micro-batch of every step, or four in the first and the last stage each.
    a_step = 8 if parallel.pipeline > 1 else 1
    plain, message = run(workers, config, {}, **changes, out=str(tmp_path / "plain"))
    assert message == "" and len(plain) == 6
    # In step 2, before a checkpoint is due, and in step 5, the fifth that is computed.
    bad = {a_step * 2 - 1: math.nan, a_step * 5 - 1: math.nan}
    losses, message = run(workers, config, bad, **changes)
    assert message == ""
    assert rollbacks(config.out) == [(2, 1, "loss is nan"), (5, 3, "loss is nan")]
    assert sorted(losses) == [1, 3, 4, 6] and losses[1] == plain[1]
    lines = list(map(json.loads, (Path(config.out) / "metrics.jsonl").read_text().splitlines()))
    assert [line["step"] for line in lines if line.get("left_out")] == [2, 5]
    assert "loss is nan" in (Path(config.out) / "report.html").read_text()


def test_a_resumed_run_leaves_out_the_same_and_loses_no_committed_step(
    workers: WorkerPool, config: TrainConfig, tmp_path: Path
) -> None:
    plain, _ = run(workers, config, {}, out=str(tmp_path / "plain"))
    # Two micro-batches a step. Step 5 is bad; steps 4 and 6 follow it, after the checkpoint of 3.
    losses, _ = run(workers, config, {8: math.nan})
    assert rollbacks(config.out) == [(5, 3, "loss is nan")]
    assert {step: losses[step] for step in (1, 2, 3, 4)} == {k: plain[k] for k in (1, 2, 3, 4)}
    assert losses[6] != plain[6]
    # As if the job had died after the rollback: from the checkpoint of step 3, without a bad step.
    [*_, last] = sorted((Path(config.out) / "checkpoints").glob("step_*"))
    last.rename(tmp_path / last.name)
    again, _ = run(workers, config, {})
    assert again == losses


def test_after_the_last_rollback_the_run_stops_and_names_the_steps(
    workers: WorkerPool, config: TrainConfig
) -> None:
    # Steps 4 and 5 bad, then 6, after two rollbacks to the checkpoint of step 3.
    _, message = run(workers, config, {6: math.nan, 8: math.inf, 10: math.nan})
    assert message == (
        "loss is nan at step 6, and guard.max_rollbacks=2 are used up (left out: steps 4, 5); "
        "stopped, the last checkpoint is intact. Lower optimizer.lr, look at the data of these "
        "steps, or raise guard.max_rollbacks"
    )
    assert [path.name for path in sorted((Path(config.out) / "checkpoints").glob("step_*"))] == [
        "step_00000001",
        "step_00000003",
    ]


def test_a_bad_first_step_has_nothing_to_go_back_to(
    workers: WorkerPool, config: TrainConfig
) -> None:
    losses, message = run(workers, config, {0: math.nan})
    assert losses == {} and message.startswith(
        "loss is nan at step 1, before there is a checkpoint"
    )


def test_a_spike_is_a_bad_step(workers: WorkerPool, config: TrainConfig) -> None:
    guard = GuardConfig(max_rollbacks=1, spike_factor=1.5, spike_window=2)
    losses, message = run(workers, config, {0: 9.0, 6: 9.0}, guard=guard)
    assert message == ""
    # Before the window is full nothing is a spike: the first step stays.
    [(step, back_to, problem)] = rollbacks(config.out)
    assert (step, back_to) == (4, 3) and problem.endswith("the median of 2 steps")
    assert sorted(losses) == [1, 2, 3, 5, 6]
