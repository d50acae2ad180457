"""Every layout equals the single process: loss and every gradient, at randomised parameters."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.oracle import (
    DENSE,
    EXACT,
    MLA,
    MODELS,
    MOE,
    MTP,
    SUMMATION_ORDER,
    Oracle,
    check,
    run_config,
)
from helpers.pool import WorkerFailed, WorkerPool
from megatron.core import __version__ as core_version
from packaging.version import Version

from mhc_megatron.config import MHCConfig, Projection
from mhc_megatron.training.config import TrainConfig

# name: (layout, what else differs, largest relative error of any gradient)
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "tp2": ({"tensor": 2}, {}, SUMMATION_ORDER),
    "tp2_sp": ({"tensor": 2, "sequence": True}, {}, SUMMATION_ORDER),
    # The pipeline runs the same micro-batches through the same layers in the same order.
    "pp2": ({"pipeline": 2}, {}, EXACT),
    "pp4_vpp2": ({"pipeline": 4, "virtual": 2}, {}, EXACT),
    "pp2_uneven": ({"pipeline": 2, "first_stage_layers": 3}, {}, EXACT),
    "dp2": ({"data": 2}, {}, SUMMATION_ORDER),
    "dp2_distributed_optimizer": (
        {"data": 2, "distributed_optimizer": True},
        {},
        SUMMATION_ORDER,
    ),
    "full_recompute": ({}, {"recompute": "full"}, EXACT),
    "core_attn_recompute": ({}, {"recompute": "core_attn"}, EXACT),
    "tp2_sp_pp2": ({"tensor": 2, "sequence": True, "pipeline": 2}, {}, SUMMATION_ORDER),
}


@pytest.fixture(scope="session")
def oracles() -> dict[str, Oracle]:
    return {}


@pytest.fixture
def oracle(
    workers: WorkerPool,
    oracles: dict[str, Oracle],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    def get(name: str) -> Oracle:
        if name not in oracles:
            folder = tmp_path_factory.mktemp(f"oracle_{name}")
            oracles[name] = Oracle(workers, run_config(MODELS[name]), folder)
        return oracles[name]

    return get


@pytest.mark.parametrize("name", LAYOUTS)
def test_dense_layout_equals_single_process(
    name: str, workers: WorkerPool, oracle: Any, tmp_path: Path
) -> None:
    layout, options, tolerance = LAYOUTS[name]
    losses, errors = oracle("dense").errors(
        workers, run_config(DENSE, layout, **options), tmp_path / "g"
    )
    check(losses, errors, tolerance, loss_tolerance=1e-6 if tolerance else 0.0)


def needs_transformer_engine(oracle: Any, model: str, what: str) -> bool:
    """On core < 0.17 without Transformer Engine these models are refused, by name."""
    if Version(core_version) >= Version("0.17"):
        return False
    with pytest.raises(WorkerFailed, match=f"UserError: {what} on megatron-core 0.16.* cannot run"):
        oracle(model)
    return True


def test_mla_equals_single_process(workers: WorkerPool, oracle: Any, tmp_path: Path) -> None:
    if needs_transformer_engine(oracle, "mla", "multi-latent attention"):
        return
    losses, errors = oracle("mla").errors(workers, run_config(MLA, {"pipeline": 2}), tmp_path / "g")
    check(losses, errors, EXACT, loss_tolerance=0.0)
    with pytest.raises(WorkerFailed, match="UserError: multi-latent attention under tensor par"):
        oracle("mla").errors(workers, run_config(MLA, {"tensor": 2}), tmp_path / "refused")


@pytest.mark.parametrize("layout", ["pp2", "tp2_sp", "tp2"])
def test_mtp_equals_single_process(
    layout: str, workers: WorkerPool, oracle: Any, tmp_path: Path
) -> None:
    arguments, options, tolerance = LAYOUTS[layout]
    losses, errors = oracle("mtp").errors(
        workers, run_config(MTP, arguments, **options), tmp_path / "g"
    )
    # Also under PP: the MTP stage's share of the embedding gradient is added at the end.
    check(losses, errors, SUMMATION_ORDER, loss_tolerance=1e-6 if tolerance else 0.0)


MOE_LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": {"data": 2, "expert": 2},
    "tp2_sp": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
}


@pytest.mark.parametrize("layout", MOE_LAYOUTS)
def test_moe_equals_single_process(
    layout: str, workers: WorkerPool, oracle: Any, tmp_path: Path
) -> None:
    if needs_transformer_engine(oracle, "moe", "MoE layers"):
        return
    losses, errors = oracle("moe").errors(
        workers, run_config(MOE, MOE_LAYOUTS[layout]), tmp_path / "g"
    )
    tolerance = EXACT if layout == "pp2" else SUMMATION_ORDER
    check(losses, errors, tolerance, loss_tolerance=1e-6 if tolerance else 0.0)


@pytest.mark.one_core
@pytest.mark.parametrize("projection", ["sinkhorn_v4", "permutation", "identity", "unconstrained"])
def test_every_projection_under_tp_sp_and_pp(
    projection: Projection, workers: WorkerPool, tmp_path: Path
) -> None:
    mhc = MHCConfig(projection=projection, contraction="learned", num_streams=3)
    oracle = Oracle(workers, run_config(DENSE, mhc=mhc), tmp_path)
    layout = {"tensor": 2, "sequence": True, "pipeline": 2}
    losses, errors = oracle.errors(workers, run_config(DENSE, layout, mhc=mhc), tmp_path / "g")
    assert max(losses) <= 1e-6
    assert max(errors.values()) <= SUMMATION_ORDER, errors
    assert "decoder.final_layernorm.contraction.weight" in errors


SINGLE_PASS = MHCConfig(variant="single_pass", contraction="read", num_streams=3)
SINGLE_PASS_LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "pp4_vpp2": LAYOUTS["pp4_vpp2"],
    "full_recompute": LAYOUTS["full_recompute"],
    "tp2_sp_pp2": LAYOUTS["tp2_sp_pp2"],
    "pp2_dualpipe_v": ({"pipeline": 2, "schedule": "dualpipe_v"}, {}, EXACT),
}


@pytest.mark.parametrize("name", SINGLE_PASS_LAYOUTS)
def test_single_pass_equals_single_process(
    name: str,
    workers: WorkerPool,
    oracles: dict[str, Oracle],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
) -> None:
    """What a stage reads first was read by the stage before it."""
    if "single_pass" not in oracles:
        folder = tmp_path_factory.mktemp("oracle_single_pass")
        oracles["single_pass"] = Oracle(workers, run_config(DENSE, mhc=SINGLE_PASS), folder)
    layout, options, tolerance = SINGLE_PASS_LAYOUTS[name]
    config = run_config(DENSE, layout, mhc=SINGLE_PASS, **options)
    losses, errors = oracles["single_pass"].errors(workers, config, tmp_path / "g")
    check(losses, errors, tolerance, loss_tolerance=1e-6 if tolerance else 0.0)


def test_single_pass_moe_with_mtp_under_tp_sp_and_pp(workers: WorkerPool, tmp_path: Path) -> None:
    # Older cores refuse MoE, by name: test_moe_equals_single_process.
    model = {**MTP, **(MOE if Version(core_version) >= Version("0.17") else {})}
    mhc = MHCConfig(variant="single_pass", contraction="read", num_streams=2)
    oracle = Oracle(workers, run_config(model, mhc=mhc), tmp_path)
    layout = {"tensor": 2, "sequence": True, "pipeline": 2}
    losses, errors = oracle.errors(workers, run_config(model, layout, mhc=mhc), tmp_path / "g")
    check(losses, errors, SUMMATION_ORDER, loss_tolerance=1e-6)


def small(config: TrainConfig) -> TrainConfig:
    """Two layers and one micro-batch: the interpreter takes seconds for each sublayer."""
    model = dataclasses.replace(config.model, num_layers=2, seq_length=8)
    return dataclasses.replace(config, model=model, global_batch_size=1)


@pytest.mark.one_core
def test_fused_kernels_equal_the_reference(workers: WorkerPool, tmp_path: Path) -> None:
    """Under TP+SP, and with layers run again. Without a GPU in Triton's interpreter."""
    reference = MHCConfig(
        backend="reference", num_streams=3, sinkhorn_iterations=3, contraction="learned"
    )
    oracle = Oracle(workers, small(run_config(DENSE, mhc=reference)), tmp_path)
    fused = dataclasses.replace(reference, backend="triton")
    for name, parallel, options in (
        ("tp2_sp", {"tensor": 2, "sequence": True}, {}),
        ("full", {}, {"recompute": "full"}),
    ):
        config = small(run_config(DENSE, parallel, mhc=fused, **options))
        losses, errors = oracle.errors(workers, config, tmp_path / name)
        check(losses, errors, SUMMATION_ORDER, loss_tolerance=1e-6)


def drop_sequence_parallel_tags(chunks: list[torch.nn.Module]) -> None:
    """The mutation: Megatron no longer knows that these gradients are partial sums."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if "hyper_connection" in name:
                parameter.sequence_parallel = False


@pytest.mark.one_core
def test_a_missing_sequence_parallel_tag_is_caught(
    workers: WorkerPool, oracle: Any, tmp_path: Path
) -> None:
    config = run_config(DENSE, {"tensor": 2, "sequence": True})
    _, errors = oracle("dense").errors(workers, config, tmp_path / "g", drop_sequence_parallel_tags)
    hyper = {name: error for name, error in errors.items() if "hyper_connection" in name}
    assert min(hyper.values()) > 100 * SUMMATION_ORDER, hyper
