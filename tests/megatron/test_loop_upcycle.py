"""A baseline of Megatron's own loop goes on as an mHC model (collected where there is the loop)."""

import dataclasses
from pathlib import Path

import pytest
from helpers import pretrain, training
from helpers.pool import WorkerPool

from mhc_megatron.convert.upcycle import upcycled_config
from mhc_megatron.errors import UserError
from mhc_megatron.training.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)

# Megatron adds up losses in float32, our trainer in float64; streams are sums of four products.
ROUNDING = 8e-7


def test_a_checkpoint_of_megatrons_loop_starts_an_mhc_model_with_its_function(
    workers: WorkerPool, tmp_path: Path
) -> None:
    train, valid = training.corpus(tmp_path)
    config = TrainConfig(
        model=ModelConfig(
            num_layers=4, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, seq_length=32
        ),
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=0),
        data=DataConfig(train=train, valid=valid),
        steps=2,
        micro_batch_size=2,
        global_batch_size=8,
        eval_iters=1,
        out=str(tmp_path / "mhc"),
    )
    board, saved = tmp_path / "tensorboard", tmp_path / "plain"
    argv = [*pretrain.arguments(config, board), "--spec", "helpers.plain_spec", "gpt"]
    argv += ["--save", str(saved), "--save-interval", "2", "--ckpt-format", "torch_dist"]
    workers.run(pretrain.run_script, 1, argv, {})
    [loss] = pretrain.scalars(board)["lm loss validation"]

    source = saved / "iter_0000002"
    two = dataclasses.replace(
        config, micro_batch_size=1, parallel=ParallelConfig(pipeline=2, schedule="dualpipe_v")
    )
    for found in workers.run(training.validation_from_plain, 2, two, source):
        assert abs(found / loss - 1) < ROUNDING
    [beginners] = workers.run(training.validation_loss, 1, config)
    assert abs(beginners / loss - 1) > 1000 * ROUNDING
    for named in (source, saved):
        with pytest.raises(UserError, match=r"is of Megatron's own loop.* with start_from_plain"):
            upcycled_config(named, [], out=str(tmp_path / "x"))
