"""Arguments of Megatron's training loop that are refused by flag, before anything is built."""

from argparse import Namespace

import pytest

from mhc_megatron.errors import UserError
from mhc_megatron.pretrain.rejected import reject_arguments, reject_model

_PLAIN = {
    "bf16": False,
    "fp16": False,
    "save": None,
    "no_save_optim": None,
    "load": None,
    "no_load_optim": None,
    "virtual_pipeline_model_parallel_size": None,
    "hybrid_layer_pattern": None,
    "heterogeneous_layers_config_path": None,
    "experimental_attention_variant": None,
    "transformer_impl": "transformer_engine",
    "moe_use_upcycling": False,
    "use_megatron_fsdp": False,
    "use_torch_fsdp2": False,
    "use_distributed_optimizer": False,
    "inprocess_restart": False,
}
_SHARDED = {"use_distributed_optimizer": True, "virtual_pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("changed", "option"),
    [
        ({"bf16": True}, "--bf16"),
        ({"fp16": True}, "--fp16"),
        (
            {"bf16": True, "save": "x", **_SHARDED},
            "--bf16 with virtual pipeline stages and --save or --load",
        ),
        (
            {"fp16": True, "load": "x", **_SHARDED},
            "--fp16 with virtual pipeline stages and --save or --load",
        ),
        ({"hybrid_layer_pattern": "M*"}, "--hybrid-layer-pattern"),
        ({"heterogeneous_layers_config_path": "x"}, "--heterogeneous-layers-config-path"),
        (
            {"experimental_attention_variant": "dsa"},
            "--experimental-attention-variant=dsa",
        ),
        (
            {"transformer_impl": "inference_optimized"},
            "--transformer-impl=inference_optimized",
        ),
        ({"use_transformer_engine_op_fuser": True}, "--use-transformer-engine-op-fuser"),
        ({"moe_use_upcycling": True}, "--moe-use-upcycling"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp"),
        ({"use_torch_fsdp2": True}, "--use-torch-fsdp2"),
        ({"inprocess_restart": True}, "--inprocess-restart"),
    ],
)
def test_what_does_not_combine_names_flag_and_remedy(
    changed: dict[str, object], option: str
) -> None:
    with pytest.raises(UserError) as refused:
        reject_arguments(Namespace(**{**_PLAIN, **changed}))
    start = f"{option} does not combine with hyper-connections: "
    message = str(refused.value)
    assert message.startswith(start)
    reason, _, remedy = message.removeprefix(start).rpartition("; ")
    assert reason and remedy


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"bf16": True, "use_distributed_optimizer": True, "save": "x", "load": "x"},
        {"bf16": True, **_SHARDED, "save": "x", "no_save_optim": True},
        {"save": "x", "load": "x", **_SHARDED},
    ],
)
def test_what_combines_is_let_through(changed: dict[str, object]) -> None:
    reject_arguments(Namespace(**{**_PLAIN, **changed}))


def test_only_gpt_models_are_let_through() -> None:
    class GPTModelConfig: ...

    class ModelOptModelConfig(GPTModelConfig): ...

    class HybridModelConfig: ...

    reject_model(GPTModelConfig())
    with pytest.raises(UserError) as hybrid:
        reject_model(HybridModelConfig())
    assert str(hybrid.value) == (
        "HybridModel cannot take hyper-connections: its Mamba, attention and MLP layers are "
        "classes of their own, one branch each, and hyper-connections are built around the two "
        "branches of TransformerLayer; use GPTModel"
    )
    with pytest.raises(UserError) as other:
        reject_model(ModelOptModelConfig())
    assert str(other.value) == (
        "a model from ModelOptModelConfig cannot take hyper-connections: its builder may replace "
        "the layer spec; use GPTModelConfig"
    )
