"""What does not combine with hyper-connections raises at construction, naming value and remedy."""

import dataclasses
from typing import Any

import pytest
import torch
from helpers import layouts
from helpers.pool import WorkerPool
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.launch.environment import World
from mhc_megatron.megatron.layer import MHCTransformerLayer
from mhc_megatron.megatron.p2p import StreamP2PCommunicator
from mhc_megatron.megatron.spec import with_hyper_connections
from mhc_megatron.training.config import ModelConfig, ParallelConfig, TrainConfig
from mhc_megatron.training.model import build_chunks, transformer_config
from mhc_megatron.training.runtime import distributed_runtime


def megatron_config(**options: Any) -> TransformerConfig:
    """A configuration with the option set after Megatron's own checks, which we do not test."""
    config = TransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=2, hidden_dropout=0.0
    )
    for name, value in options.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dropout": 0.1}, "hidden_dropout=0.1 .* set hidden_dropout=0"),
        ({"fused_residual_rmsnorm": True}, "fused_residual_rmsnorm=True .* set it to False"),
        ({"fp32_residual_connection": True}, "fp32_residual_connection=True .* set it to False"),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
            r"recompute_modules=\['mlp'\] .* recompute_granularity='full'",
        ),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
            r"recompute_modules=\['layernorm'\]",
        ),
        ({"cuda_graph_impl": "local"}, "cuda_graph_impl='local' .* cuda_graph_impl='none'"),
        (
            {"fine_grained_activation_offloading": True, "offload_modules": ["attn_norm"]},
            r"offload_modules=\['attn_norm'\] .* leave the norms out",
        ),
        ({"inference_fuse_tp_communication": True}, "inference_fuse_tp_communication=True"),
        ({"mlp_chunks_for_prefill": 4}, "mlp_chunks_for_prefill=4 .* mlp_chunks_for_prefill=1"),
        ({"mlp_chunks_for_training": 2}, "mlp_chunks_for_training=2"),
        ({"overlap_moe_expert_parallel_comm": True}, "overlap_moe_expert_parallel_comm=True"),
    ],
)
def test_option_is_refused(options: dict[str, Any], message: str) -> None:
    submodules = get_gpt_layer_local_spec().submodules
    with pytest.raises(UserError, match=message) as caught:
        MHCTransformerLayer(megatron_config(**options), submodules, mhc=MHCConfig())
    assert "\n" not in str(caught.value)


def test_single_pass_refuses_cpu_offloading() -> None:
    """Offloading replaces the tensor by which a layer knows what was handed over with it."""
    submodules = get_gpt_layer_local_spec().submodules
    mhc = MHCConfig(variant="single_pass")
    with pytest.raises(UserError, match=r"cpu_offloading=True .* or variant=") as e:
        MHCTransformerLayer(megatron_config(cpu_offloading=True), submodules, mhc=mhc)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recompute_granularity": "full"}, "recompute_granularity='full' .* recompute='none'"),
        ({"cpu_offloading": True}, "cpu_offloading=True .* set it to False"),
        (
            {"fine_grained_activation_offloading": True, "offload_modules": ["qkv_linear"]},
            "fine_grained_activation_offloading=True .* recompute='none'",
        ),
        ({"enable_autocast": True}, "enable_autocast=True .* outside autocast"),
    ],
)
def test_option_is_refused_with_recompute(options: dict[str, Any], message: str) -> None:
    submodules = get_gpt_layer_local_spec().submodules
    with pytest.raises(UserError, match=message) as caught:
        MHCTransformerLayer(
            megatron_config(**options), submodules, mhc=MHCConfig(recompute="stage")
        )
    assert "of the hyper-connections" in str(caught.value)


def test_a_stage_shorter_than_a_recompute_block_is_refused() -> None:
    block = TransformerBlockSubmodules(
        layer_specs=[get_gpt_layer_local_spec()] * 2, layer_norm=IdentityOp
    )
    mhc = MHCConfig(recompute="block", recompute_block=5)
    with pytest.raises(UserError, match="recompute_block=5 is above the 4 sublayers of a stage"):
        with_hyper_connections(block, mhc, holds_first_layer=True)


def test_cross_attention_is_refused() -> None:
    submodules = dataclasses.replace(
        get_gpt_layer_local_spec().submodules, cross_attention=ModuleSpec(module=torch.nn.Linear)
    )
    with pytest.raises(UserError, match=r"cross attention .* decoder-only"):
        MHCTransformerLayer(megatron_config(), submodules, mhc=MHCConfig())


def test_stage_without_layers_is_refused() -> None:
    empty = TransformerBlockSubmodules(layer_specs=[], layer_norm=IdentityOp)
    with pytest.raises(UserError, match="without decoder layers"):
        with_hyper_connections(empty, MHCConfig(), holds_first_layer=True)


def test_foreign_layer_is_refused() -> None:
    block = TransformerBlockSubmodules(
        layer_specs=[ModuleSpec(module=torch.nn.Linear)], layer_norm=IdentityOp
    )
    with pytest.raises(UserError, match="layer spec of Linear cannot take"):
        with_hyper_connections(block, MHCConfig(), holds_first_layer=True)


class TwoRanks:
    """Stands for a process group of two ranks."""

    def size(self) -> int:
        return 2


def test_two_ranks_with_virtual_stages_and_batched_p2p_are_refused() -> None:
    config = megatron_config(virtual_pipeline_model_parallel_size=2, batch_p2p_comm=True)
    with pytest.raises(UserError, match=r"pipeline_model_parallel_size=2 .* mixes up messages"):
        StreamP2PCommunicator(TwoRanks(), config, hidden_parts=4)  # type: ignore[arg-type]


def build_facts(rank: int, world_size: int, config: TrainConfig) -> dict[str, Any]:
    """What construction must leave on the hyper-connections' parameters."""
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        [model] = build_chunks(config, transformer_config(config), vocab_size=layouts.VOCAB)
        named = {n: p for n, p in model.named_parameters() if "hyper_connection" in n}
        return {
            "dtypes": {p.dtype for p in named.values()},
            "tags": {p.sequence_parallel for p in named.values()},
            "names": sorted({n.rpartition("layers.0.")[2] for n in named if "layers.0." in n}),
            "branch_dtypes": {p.dtype for n, p in model.named_parameters() if "linear" in n},
        }


@pytest.mark.parametrize("sequence", [False, True])
def test_parameters_keep_float32_tags_and_upstream_names(
    sequence: bool, workers: WorkerPool
) -> None:
    config = TrainConfig(
        model=ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=2, ffn_hidden_size=16),
        parallel=ParallelConfig(tensor=2, sequence=sequence, distributed_optimizer=True),
        dtype="bf16",
    )
    facts = workers.run(build_facts, 2, config)[0]
    assert facts["dtypes"] == {torch.float32}
    assert facts["branch_dtypes"] == {torch.bfloat16}
    assert facts["tags"] == {sequence}
    assert facts["names"] == sorted(
        f"{branch}_hyper_connection.{parameter}"
        for branch in ("mlp", "self_attention")
        for parameter in ("alpha_post", "alpha_pre", "alpha_res", "bias", "mapping_proj.weight")
    )
