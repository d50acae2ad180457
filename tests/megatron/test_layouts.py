"""Every layout equals the single process: loss and every gradient, at randomised parameters."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import layouts
from helpers.pool import WorkerFailed, WorkerPool
from megatron.core import __version__ as core_version
from packaging.version import Version

from mhc_megatron.config import MHCConfig, Projection
from mhc_megatron.training.config import ModelConfig, ParallelConfig, TrainConfig

DENSE: dict[str, Any] = {}
MOE: dict[str, Any] = {"num_moe_experts": 4, "moe_ffn_hidden_size": 32}
MLA: dict[str, Any] = {"multi_latent_attention": True}
MTP: dict[str, Any] = {"mtp_num_layers": 1}
MODELS = {"dense": DENSE, "moe": MOE, "mla": MLA, "mtp": MTP}

# Tensor parallelism sums matrix products over ranks, in another order than one process does:
# float32 rounding (6e-8) grows to this much over 8 layers, most in the gradients of the gates
# (alpha), which are sums over all tokens that nearly cancel.
SUMMATION_ORDER = 5e-4
EXACT = 0.0

# name: (layout, what else differs, largest relative error of any gradient)
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "tp2": ({"tensor": 2}, {}, SUMMATION_ORDER),
    "tp2_sp": ({"tensor": 2, "sequence": True}, {}, SUMMATION_ORDER),
    # The pipeline runs the same micro-batches through the same layers in the same order.
    "pp2": ({"pipeline": 2}, {}, EXACT),
    "pp4_vpp2": ({"pipeline": 4, "virtual": 2}, {}, EXACT),
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


def run_config(
    model: dict[str, Any],
    layout: dict[str, Any] | None = None,
    *,
    mhc: MHCConfig | None = None,
    **options: Any,
) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            num_layers=8,
            hidden_size=32,
            num_attention_heads=4,
            ffn_hidden_size=64,
            seq_length=16,
            **model,
        ),
        mhc=mhc or MHCConfig(),
        parallel=ParallelConfig(**(layout or {})),
        micro_batch_size=1,
        global_batch_size=4,
        **options,
    )


class Oracle:
    """Single-process parameters, loss and gradients of a model, made once for all layouts."""

    def __init__(self, workers: WorkerPool, config: TrainConfig, folder: Path) -> None:
        self.initial, self.gradients = folder / "initial", folder / "gradients"
        for path in (self.initial, self.gradients):
            path.mkdir(parents=True)
        workers.run(layouts.save_initial, 1, config, str(self.initial))
        [self.loss] = workers.run(
            layouts.losses_and_gradients, 1, config, str(self.initial), str(self.gradients)
        )

    def errors(
        self, workers: WorkerPool, config: TrainConfig, folder: Path, spoil: Any = None
    ) -> tuple[list[float], dict[str, float]]:
        """(each rank's relative loss error, every gradient's relative error)."""
        folder.mkdir(parents=True)
        losses = workers.run(
            layouts.losses_and_gradients,
            config.parallel.world_size,
            config,
            str(self.initial),
            str(folder),
            spoil,
        )
        [errors] = workers.run(layouts.differences, 1, str(folder), str(self.gradients))
        return [abs(loss / self.loss - 1) for loss in losses], errors


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


def check(
    losses: list[float], errors: dict[str, float], tolerance: float, *, loss_tolerance: float
) -> None:
    assert max(losses) <= loss_tolerance, losses
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, wrong
    hyper = [name for name in errors if "hyper_connection" in name]
    assert len(hyper) == 2 * 5, hyper  # stacked over layers: weight, three alphas, bias, twice


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


def test_fused_kernels_equal_the_reference_under_tp_sp(workers: WorkerPool, tmp_path: Path) -> None:
    """Without a GPU the kernels run in Triton's interpreter."""
    reference = MHCConfig(backend="reference", projection="sinkhorn_v4", num_streams=3)
    oracle = Oracle(workers, run_config(DENSE, mhc=reference), tmp_path)
    fused = dataclasses.replace(reference, backend="triton")
    layout = {"tensor": 2, "sequence": True}
    losses, errors = oracle.errors(workers, run_config(DENSE, layout, mhc=fused), tmp_path / "g")
    check(losses, errors, SUMMATION_ORDER, loss_tolerance=1e-6)


def drop_sequence_parallel_tags(chunks: list[torch.nn.Module]) -> None:
    """The mutation: Megatron no longer knows that these gradients are partial sums."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if "hyper_connection" in name:
                parameter.sequence_parallel = False


def test_a_missing_sequence_parallel_tag_is_caught(
    workers: WorkerPool, oracle: Any, tmp_path: Path
) -> None:
    config = run_config(DENSE, {"tensor": 2, "sequence": True})
    _, errors = oracle("dense").errors(workers, config, tmp_path / "g", drop_sequence_parallel_tags)
    hyper = {name: error for name, error in errors.items() if "hyper_connection" in name}
    assert min(hyper.values()) > 100 * SUMMATION_ORDER, hyper
