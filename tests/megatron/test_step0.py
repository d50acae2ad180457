"""At the A.6 initialisation an mHC model computes the plain residual model's function."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import layouts
from helpers.pool import WorkerPool
from megatron.core import dist_checkpointing

from mhc_megatron.config import Contraction, MHCConfig, Projection
from mhc_megatron.launch.environment import World
from mhc_megatron.training.config import ModelConfig, ParallelConfig, TrainConfig
from mhc_megatron.training.model import build_chunks, transformer_config
from mhc_megatron.training.pipeline import forward_backward_func
from mhc_megatron.training.runtime import distributed_runtime
from mhc_megatron.training.step import run_step


def config(residual: str, mhc: MHCConfig, **layout: Any) -> TrainConfig:
    return TrainConfig(
        # The read weights sum to 1.09: only a norm with a vanishing eps removes that scale.
        model=ModelConfig(
            residual=residual,  # type: ignore[arg-type]
            num_layers=8,
            hidden_size=32,
            num_attention_heads=4,
            ffn_hidden_size=64,
            seq_length=16,
            norm_eps=1e-20,
        ),
        mhc=mhc,
        parallel=ParallelConfig(**layout),
        micro_batch_size=1,
        global_batch_size=4,
    )


def first_loss(
    rank: int, world_size: int, config: TrainConfig, folder: str, save: bool, double: bool
) -> float:
    """The loss of the untouched initialisation over the shared branch weights."""
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        megatron_config = transformer_config(config)
        chunks = build_chunks(config, megatron_config, vocab_size=layouts.VOCAB)
        if double:
            chunks = [chunk.double() for chunk in chunks]
            megatron_config.params_dtype = megatron_config.pipeline_dtype = torch.float64
        state = layouts.sharded(chunks)
        if save:
            dist_checkpointing.save(state, folder)
        else:
            branches = {
                key: {k: v for k, v in part.items() if "hyper_conn" not in k and "contr" not in k}
                for key, part in state.items()
            }
            dist_checkpointing.load(branches, folder)
        return run_step(
            config,
            forward_backward_func(config, megatron_config),
            chunks,
            layouts.micro_batches(config, step=0),
            forward_only=True,
        )


LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "tp2_sp": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "pp4_vpp2": {"pipeline": 4, "virtual": 2},
    "dp2": {"data": 2},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    return {double: tmp_path_factory.mktemp(f"plain{double}") for double in (False, True)}


@pytest.fixture
def plain_loss(plain: dict[bool, Any], workers: WorkerPool) -> Any:
    losses: dict[bool, float] = {}

    def get(double: bool) -> tuple[float, Path]:
        folder: Path = plain[double]
        save = not any(folder.iterdir())
        if double not in losses:
            arguments = (config("plain", MHCConfig()), str(folder), save, double)
            [losses[double]] = workers.run(first_loss, 1, *arguments)
        return losses[double], folder

    return get


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_plain_model_in_every_layout(
    layout: str, workers: WorkerPool, plain_loss: Any
) -> None:
    expected, folder = plain_loss(False)
    model = config("mhc", MHCConfig(), **LAYOUTS[layout])
    losses = workers.run(first_loss, model.parallel.world_size, model, str(folder), False, False)
    # float32 rounding of a loss of about 5, over 16 sublayers.
    assert max(abs(loss / expected - 1) for loss in losses) < 1e-6


@pytest.mark.parametrize("projection", ["sinkhorn", "permutation", "identity", "unconstrained"])
@pytest.mark.parametrize("contraction", ["mean", "sum", "learned"])
def test_equals_the_plain_model_to_float64_rounding(
    projection: Projection, contraction: Contraction, workers: WorkerPool, plain_loss: Any
) -> None:
    expected, folder = plain_loss(True)
    mhc = MHCConfig(projection=projection, contraction=contraction)
    [loss] = workers.run(first_loss, 1, config("mhc", mhc), str(folder), False, True)
    assert abs(loss / expected - 1) < 1e-12


@pytest.mark.parametrize("contraction", ["mean", "read"])
def test_single_pass_equals_the_plain_model(
    contraction: Contraction, workers: WorkerPool, plain_loss: Any
) -> None:
    expected, folder = plain_loss(True)
    mhc = MHCConfig(variant="single_pass", contraction=contraction)
    [loss] = workers.run(first_loss, 1, config("mhc", mhc), str(folder), False, True)
    assert abs(loss / expected - 1) < 1e-12


def test_the_v4_floor_breaks_the_equality_only_by_its_eps(
    workers: WorkerPool, plain_loss: Any
) -> None:
    expected, folder = plain_loss(True)
    mhc = MHCConfig(projection="sinkhorn_v4")
    [loss] = workers.run(first_loss, 1, config("mhc", mhc), str(folder), False, True)
    assert 0 < abs(loss / expected - 1) < 100 * mhc.sinkhorn_eps
    exact = dataclasses.replace(mhc, sinkhorn_eps=1e-15)
    [loss] = workers.run(first_loss, 1, config("mhc", exact), str(folder), False, True)
    assert abs(loss / expected - 1) < 1e-12
