"""A trained plain model becomes an mHC model with the same function."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import training
from helpers.pool import WorkerPool

from mhc_megatron.config import MHCConfig
from mhc_megatron.convert.upcycle import require_exact, start_as_plain, upcycled_config
from mhc_megatron.errors import UserError
from mhc_megatron.hyper_connection import HyperConnection
from mhc_megatron.launch import cli
from mhc_megatron.streams import Contraction
from mhc_megatron.training.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from mhc_megatron.training.overrides import apply_overrides

# The rounding of a float32 loss of about 5 over 8 sublayers, whose streams are sums of four
# products where the baseline's is one number.
ROUNDING = 5e-7


CASES = (
    [],
    ["mhc.contraction=learned"],
    ["mhc.projection=unconstrained", "mhc.num_streams=3"],
    ["mhc.variant=single_pass", "mhc.contraction=read", "mhc.projection=permutation"],
)


def plain(folder: Path, **changes: Any) -> TrainConfig:
    train, valid = training.corpus(folder)
    model = ModelConfig(
        residual="plain",
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        norm_eps=1e-3,  # large, so that the scale of what a norm reads shows in the loss
        seq_length=32,
    )
    return TrainConfig(
        model=model,
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=1),
        data=DataConfig(train=train, valid=valid),
        steps=6,
        micro_batch_size=2,
        global_batch_size=4,
        eval_iters=1,
        out=str(folder / "plain"),
        **changes,
    )


def validation(workers: WorkerPool, config: TrainConfig, step: int) -> float:
    [(done, loss)] = workers.run(training.resumed_validation, 1, config)
    assert done == step
    return loss


def test_an_upcycled_model_starts_with_the_baselines_function(
    workers: WorkerPool, tmp_path: Path
) -> None:
    two = plain(tmp_path, parallel=ParallelConfig(tensor=2))
    workers.run(training.train_steps, 2, two, 3, True)
    source = Path(two.out, "checkpoints", "step_00000003")
    one = dataclasses.replace(two, parallel=ParallelConfig())
    loss = validation(workers, one, 3)
    for index, overrides in enumerate(CASES):
        config = upcycled_config(source, overrides, out=str(tmp_path / str(index)))
        [written] = workers.run(training.upcycled, 1, source, config)
        assert written == tmp_path / str(index) / "checkpoints" / "step_00000000"
        assert abs(validation(workers, config, 0) / loss - 1) < ROUNDING, overrides
    # It trains on, from step 0, and the loss of its first batch is no beginner's.
    [losses] = workers.run(training.train_steps, 1, config, 2)
    assert len(losses) == 2 and losses[0] < 5.5  # log(256) is 5.55
    # With the H_pre of training from scratch, whose weights sum to 1.095, it is another function.
    config = upcycled_config(source, [], out=str(tmp_path / "paper"))
    workers.run(training.upcycled, 1, source, config, True)
    assert abs(validation(workers, config, 0) / loss - 1) > 4 * ROUNDING


def test_half_precision_and_the_command(workers: WorkerPool, tmp_path: Path) -> None:
    config = plain(tmp_path, dtype="bf16", parallel=ParallelConfig(distributed_optimizer=True))
    workers.run(training.train_steps, 1, config, 2, True)
    source = Path(config.out, "checkpoints", "step_00000002")
    out = tmp_path / "mhc"
    arguments = ["convert", "upcycle", str(source), "--out", str(out), "--set", "steps=4"]
    assert cli.main(arguments) == 0
    upcycled = apply_overrides(config, ["model.residual=mhc", "steps=4", f"out={out}"])
    # Streams are bfloat16: 2^-8 per rounding, and the four products of H_res round as one number.
    assert abs(validation(workers, upcycled, 0) / validation(workers, config, 2) - 1) < 2**-8
    with pytest.raises(UserError, match="step_00000000 exists; choose another --out"):
        upcycled_config(source, [], out=str(out))
    with pytest.raises(UserError, match=r"has model.residual='mhc'; only a plain baseline"):
        upcycled_config(out / "checkpoints" / "step_00000000", [], out=str(tmp_path / "x"))
    with pytest.raises(UserError, match=r"model\.\* and dtype are the baseline's"):
        upcycled_config(source, ["model.num_layers=2"], out=str(tmp_path / "x"))
    with pytest.raises(UserError, match="is not a checkpoint of mhc-megatron train; name a folder"):
        upcycled_config(tmp_path, [], out=str(tmp_path / "x"))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_reading_weights_sum_to_one(n: int) -> None:
    mhc = MHCConfig(num_streams=n, contraction="learned")
    model = torch.nn.ModuleList(
        [HyperConnection(mhc, hidden_size=8, sublayer=1), Contraction(mhc, hidden_size=8)]
    )
    connection, contraction = model
    rest = connection.bias[n:].clone()
    start_as_plain(model)
    read = torch.sigmoid(connection.bias[:n])
    assert read.argmax() == 1 and read.max() > 0.95
    assert torch.equal(connection.bias[n:], rest)
    torch.testing.assert_close(read.sum(), torch.tensor(1.0))
    weights = torch.sigmoid(contraction.bias) + mhc.sinkhorn_eps
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("mhc", "message"),
    [
        (MHCConfig(num_streams=1), "num_streams=1: H_pre is a sigmoid and cannot be 1"),
        (MHCConfig(projection="sinkhorn_v4"), "its rows fall short of 1 by sinkhorn_eps"),
        (MHCConfig(contraction="sum"), "hands 4 times the baseline's stream to the final norm"),
    ],
    ids=["one_stream", "sinkhorn_v4", "sum"],
)
def test_what_would_be_met_only_about_is_refused(mhc: MHCConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        require_exact(mhc)
