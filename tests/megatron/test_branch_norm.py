"""The layer's RMSNorm applied by the kernels: to which numbers, and what stays as it is."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from helpers import layouts
from helpers.fused import relative_error
from helpers.oracle import DENSE, Oracle, check
from helpers.oracle import run_config as run_config_of_layouts
from helpers.pool import WorkerPool
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from torch import nn

from mhc_megatron.branch_norm import BranchNorm
from mhc_megatron.config import MHCConfig
from mhc_megatron.launch.environment import World
from mhc_megatron.megatron.layer import MHCTransformerLayer
from mhc_megatron.megatron.spec import gpt_block_spec, with_hyper_connections
from mhc_megatron.training.config import ModelConfig, TrainConfig
from mhc_megatron.training.model import transformer_config
from mhc_megatron.training.runtime import distributed_runtime

LAYERS = 2
# Rounding alone: the first sublayer's streams are equal, and mixing them changes nothing.
NOISE = tuple(
    f"decoder.layers.0.self_attention_hyper_connection.alpha_{part}" for part in ("pre", "res")
)
KERNELS = MHCConfig(backend="triton", num_streams=2, sinkhorn_iterations=2)
REFERENCE = dataclasses.replace(KERNELS, backend="reference")


def run_config(mhc: MHCConfig, **options: Any) -> TrainConfig:
    model = ModelConfig(
        num_layers=LAYERS, hidden_size=16, num_attention_heads=2, ffn_hidden_size=32, seq_length=8
    )
    return TrainConfig(model=model, mhc=mhc, micro_batch_size=1, global_batch_size=1, **options)


def block_spec(config: TrainConfig, megatron_config: Any, kind: str) -> Any:
    """Ours, or megatron-core's own block spec, whose norms are PyTorch's."""
    if kind != "stock":
        return gpt_block_spec(megatron_config, config.mhc, use_transformer_engine=False)
    stock = get_gpt_decoder_block_spec(
        megatron_config, use_transformer_engine=False, normalization="RMSNorm"
    )
    return with_hyper_connections(stock, config.mhc, holds_first_layer=True)


def step(rank: int, world_size: int, config: TrainConfig, kind: str) -> tuple:
    """Losses, gradients, names in the state, and which calls of the norms had an input."""
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        megatron_config = transformer_config(config)
        if kind == "layernorm":
            megatron_config.normalization = "LayerNorm"
        model = GPTModel(
            config=megatron_config,
            transformer_layer_spec=block_spec(config, megatron_config, kind),
            vocab_size=128,
            max_sequence_length=8,
            position_embedding_type="rope",
        )
        layouts.randomise([model], seed=1)
        inputs: list[bool] = []
        norms: list[nn.Module] = []
        for layer in model.modules():
            if isinstance(layer, MHCTransformerLayer):
                norms += [layer.input_layernorm, layer.pre_mlp_layernorm]
        for norm in norms:
            norm.register_forward_pre_hook(lambda _, args: inputs.append(bool(args)))
        sample = layouts.sample(0, 8)
        losses = model(sample["tokens"], sample["position_ids"], None, labels=sample["labels"])
        losses.sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        tagged = all(
            getattr(norm.weight, "sequence_parallel", None) is False
            for norm in norms
            if isinstance(norm, BranchNorm)
        )
        return losses.detach(), gradients, sorted(model.state_dict()), inputs, tagged


@pytest.mark.parametrize("kind", ["ours", "stock", "layernorm"])
def test_the_kernels_apply_a_norm_that_lets_them(kind: str, workers: WorkerPool) -> None:
    found = [workers.run(step, 1, run_config(mhc), kind)[0] for mhc in (REFERENCE, KERNELS)]
    (losses, gradients, names, inputs, tagged), (same, grads, same_names, asked, still) = found
    # Each norm is called once, on the kernels for its weight alone.
    assert inputs == [True] * 2 * LAYERS
    assert asked == [kind != "ours"] * 2 * LAYERS
    assert names == same_names
    assert tagged and still
    # Sums of float32 in another order; a gate's gradient is one sum in which much cancels.
    assert relative_error(same, losses) <= 1e-6
    for name, gradient in gradients.items():
        if name not in NOISE:
            assert gradient.abs().sum() > 0, name
            allowed = 2e-3 if ".alpha_" in name else 1e-4
            assert relative_error(grads[name], gradient) <= allowed, name
    assert sum("_layernorm.weight" in name for name in gradients) == 2 * LAYERS


def test_sequence_parallel_ranks_add_up_the_weights_gradient(
    workers: WorkerPool, tmp_path: Path
) -> None:
    """Each rank has its shard of the tokens; the reference in a single process has them all."""

    def small(layout: dict[str, Any], mhc: MHCConfig) -> TrainConfig:
        config = run_config_of_layouts(DENSE, layout, global_batch_size=2, mhc=mhc)
        model = dataclasses.replace(config.model, num_layers=2, seq_length=8)
        return dataclasses.replace(config, model=model)

    single = Oracle(workers, small({}, REFERENCE), tmp_path / "single")
    config = small({"tensor": 2, "sequence": True}, KERNELS)
    losses, errors = single.errors(workers, config, tmp_path / "parallel")
    assert any("layer_norm_weight" in name or "input_layernorm" in name for name in errors)
    # Sums of float32 in another order.
    check(losses, errors, 1e-4, loss_tolerance=1e-6)
