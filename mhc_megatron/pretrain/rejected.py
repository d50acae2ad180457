"""Arguments of Megatron's training loop that do not combine: refused by flag, with the remedy.

What a layer can see for itself is refused by the layer (megatron/unsupported.py).
"""

from argparse import Namespace
from typing import Any

from mhc_megatron.errors import UserError
from mhc_megatron.refusals import refuse_first

_HYBRID = (
    "its Mamba, attention and MLP layers are classes of their own, one branch each, and "
    "hyper-connections are built around the two branches of TransformerLayer"
)
_WRAPPER = "no test shows that its wrapper keeps float32 parameters beside half-precision ones"


def reject_model(model_config: Any) -> None:
    """Raise a UserError unless ``model_config`` is Megatron's GPTModelConfig, unextended.

    Args:
        model_config: what ``gpt_config_from_args`` of the script returned.
    """
    name = type(model_config).__name__
    if name == "HybridModelConfig":
        raise UserError(f"HybridModel cannot take hyper-connections: {_HYBRID}; use GPTModel")
    if name != "GPTModelConfig":
        raise UserError(
            f"a model from {name} cannot take hyper-connections: its builder may replace the layer "
            "spec; use GPTModelConfig"
        )


def reject_arguments(args: Namespace) -> None:
    """Raise a UserError for the first of Megatron's arguments that would be ignored or go wrong.

    Args:
        args: Megatron's, parsed and validated.
    """
    half = "--bf16" if args.bf16 else "--fp16" if args.fp16 else None
    keeps_optimizer = (args.save is not None and not args.no_save_optim) or (
        args.load is not None and not args.no_load_optim
    )
    virtual = args.virtual_pipeline_model_parallel_size
    refusals = (
        (args.hybrid_layer_pattern, "--hybrid-layer-pattern", _HYBRID, "leave it out"),
        (
            args.heterogeneous_layers_config_path,
            "--heterogeneous-layers-config-path",
            "its layers are not TransformerLayers with two branches each",
            "leave it out",
        ),
        (
            args.experimental_attention_variant,
            f"--experimental-attention-variant={args.experimental_attention_variant}",
            "its block spec is not the stock one that hyper-connections start from",
            "leave it out",
        ),
        (
            args.transformer_impl == "inference_optimized",
            "--transformer-impl=inference_optimized",
            "its layers add the residual inside the branch",
            "use transformer_engine or local",
        ),
        (
            getattr(args, "use_transformer_engine_op_fuser", False),
            "--use-transformer-engine-op-fuser",
            "Megatron's block spec, from which hyper-connections start, does not build fused ops",
            "leave it out",
        ),
        (
            args.moe_use_upcycling,
            "--moe-use-upcycling",
            "it builds a dense model with the same layer spec",
            "convert the checkpoint first, and load it",
        ),
        (args.use_megatron_fsdp, "--use-megatron-fsdp", _WRAPPER, "use DDP"),
        (args.use_torch_fsdp2, "--use-torch-fsdp2", _WRAPPER, "use DDP"),
        (
            half and not args.use_distributed_optimizer,
            str(half),
            "Megatron's other half-precision optimizer cannot checkpoint a model whose "
            "hyper-connections stay float32",
            "add --use-distributed-optimizer",
        ),
        (
            half and virtual and keeps_optimizer,
            f"{half} with virtual pipeline stages and --save or --load",
            "the distributed optimizer (core 0.19) would give a parameter the state of another: "
            "it numbers float32 parameters chunk by chunk but holds them before all others",
            "use one stage per rank, or --no-save-optim and --no-load-optim",
        ),
        (
            args.inprocess_restart,
            "--inprocess-restart",
            "the pipeline's communicator would keep the process groups of before the restart",
            "restart the processes",
        ),
    )
    refuse_first("hyper-connections", refusals)
