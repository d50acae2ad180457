"""A model in a single process, and what another layout's losses and gradients lack of equality."""

from pathlib import Path
from typing import Any

from helpers import layouts
from helpers.pool import WorkerPool
from mhc_megatron.config import MHCConfig
from mhc_megatron.training.config import ModelConfig, ParallelConfig, TrainConfig

DENSE: dict[str, Any] = {}
MOE: dict[str, Any] = {"num_moe_experts": 4, "moe_ffn_hidden_size": 32}
# DeepEP takes tokens in bf16, of several ranks. For a pool with a stand-in (``fake_deep_ep``).
FLEX: dict[str, Any] = {**MOE, "moe_token_dispatcher": "flex"}
FLEX_LAYOUT: dict[str, Any] = {"data": 2, "expert": 2, "distributed_optimizer": True}
MLA: dict[str, Any] = {"multi_latent_attention": True}
MTP: dict[str, Any] = {"mtp_num_layers": 1}
MODELS = {"dense": DENSE, "moe": MOE, "mla": MLA, "mtp": MTP}

# Tensor parallelism sums matrix products over ranks, in another order than one process does:
# float32 rounding (6e-8) grows to this much over 8 layers, most in the gradients of the gates
# (alpha), which are sums over all tokens that nearly cancel.
SUMMATION_ORDER = 5e-4
EXACT = 0.0


def run_config(
    model: dict[str, Any],
    layout: dict[str, Any] | None = None,
    *,
    mhc: MHCConfig | None = None,
    num_layers: int = 8,
    global_batch_size: int = 4,
    **options: Any,
) -> TrainConfig:
    """Few iterations, which are most of a step on a CPU: how many, no layout depends on."""
    return TrainConfig(
        model=ModelConfig(
            num_layers=num_layers,
            hidden_size=32,
            num_attention_heads=4,
            ffn_hidden_size=64,
            seq_length=16,
            **model,
        ),
        mhc=mhc or MHCConfig(sinkhorn_iterations=3),
        parallel=ParallelConfig(**(layout or {})),
        micro_batch_size=1,
        global_batch_size=global_batch_size,
        **options,
    )


class Oracle:
    """Single-process parameters, loss and gradients of a model, made once for all layouts.

    With ``halves``, those of either half of the micro-batches are added up by themselves.
    """

    def __init__(
        self, workers: WorkerPool, config: TrainConfig, folder: Path, *, halves: bool = False
    ) -> None:
        self.initial, self.gradients = folder / "initial", folder / "gradients"
        for path in (self.initial, self.gradients):
            path.mkdir(parents=True)
        workers.run(layouts.save_initial, 1, config, str(self.initial))
        arguments = (config, str(self.initial), str(self.gradients), None, halves)
        [self.loss] = workers.run(layouts.losses_and_gradients, 1, *arguments)

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


def check(
    losses: list[float], errors: dict[str, float], tolerance: float, *, loss_tolerance: float
) -> None:
    assert max(losses, default=0.0) <= loss_tolerance, losses
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, wrong
    hyper = [name for name in errors if "hyper_connection" in name]
    assert len(hyper) == 2 * 5, hyper  # stacked over layers: weight, three alphas, bias, twice
