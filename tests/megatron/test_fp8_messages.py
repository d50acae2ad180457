"""Training with messages in eight bits: the same under schedules with the same hops, and close."""

import dataclasses
from pathlib import Path

import pytest
from helpers import training
from helpers.pool import WorkerPool

from mhc_megatron.config import MHCConfig
from mhc_megatron.training.config import DataConfig, ModelConfig, ParallelConfig, TrainConfig

# e4m3 rounds by at most 1/16 of a number, and the sums over a token's 128 numbers average that out.
NEAR = 1e-2


def losses(workers: WorkerPool, config: TrainConfig, **layout: object) -> list[float]:
    config = dataclasses.replace(config, parallel=ParallelConfig(pipeline=2, **layout))  # type: ignore[arg-type]
    [first, second] = workers.run(training.train_steps, 2, config, 4)
    assert first == second
    return first


@pytest.mark.one_core
def test_schedules_with_the_same_hops_agree(workers: WorkerPool, tmp_path: Path) -> None:
    train, valid = training.corpus(tmp_path)
    config = TrainConfig(
        model=ModelConfig(
            num_layers=4, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, seq_length=32
        ),
        data=DataConfig(train=train, valid=valid),
        steps=4,
        micro_batch_size=1,
        global_batch_size=4,
        out=str(tmp_path / "run"),
    )
    exact = losses(workers, config, schedule="zb_h1")
    found = losses(workers, config, schedule="zb_h1", messages="fp8")
    assert found == losses(workers, config, schedule="one_f_one_b", messages="fp8")
    # Of bidirectional DualPipe every stage has the same neighbours; two copies add up gradients.
    both_ways = losses(workers, config, schedule="dualpipe", messages="fp8")
    assert both_ways[0] == found[0]
    layout = {"schedule": "dualpipe_v", "messages": "fp8"}
    turning = losses(workers, config, **layout)
    rebuilds = dataclasses.replace(config, mhc=MHCConfig(recompute="stage"))
    assert losses(workers, rebuilds, overlap="all", **layout) == turning
    for approximate in (found, both_ways, turning):
        assert all(a != b for a, b in zip(approximate, exact, strict=True))
        assert all(abs(a / b - 1) < NEAR for a, b in zip(approximate, exact, strict=True))
