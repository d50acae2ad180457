"""Megatron options that a hyper-connected layer would have to ignore: refused, with the remedy."""

from collections.abc import Iterator

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.megatron.compat import require_transformer_engine_where_core_does
from mhc_megatron.refusals import Refusal, refuse_first


def _is_identity(module: object) -> bool:
    return module is IdentityOp or getattr(module, "module", None) is IdentityOp


def reject_unsupported(config: TransformerConfig, submodules: TransformerLayerSubmodules) -> None:
    """Raise a UserError for the first option that does not combine with hyper-connections.

    Args:
        config: the model's configuration.
        submodules: the layer's submodules, from a stock spec.
    """
    require_transformer_engine_where_core_does(config)
    refuse_first("hyper-connections", _unsupported(config, submodules))


def _unsupported(
    config: TransformerConfig, submodules: TransformerLayerSubmodules
) -> Iterator[Refusal]:
    yield (
        not _is_identity(submodules.cross_attention),
        "cross attention",
        "the layer has two residual branches, attention and MLP",
        "use a decoder-only spec",
    )
    yield (
        config.hidden_dropout > 0,
        f"hidden_dropout={config.hidden_dropout}",
        "the branch output is mixed into n streams without dropout",
        "set hidden_dropout=0",
    )
    yield (
        config.fp32_residual_connection,
        "fp32_residual_connection=True",
        "the streams have the layers' dtype and the mixing is summed in float32 already",
        "set it to False",
    )
    yield (
        getattr(config, "fused_residual_rmsnorm", False),
        "fused_residual_rmsnorm=True",
        "its norm hands its input on as the residual, which here are the streams",
        "set it to False",
    )
    if config.recompute_granularity == "selective":
        lost = {"layernorm", "mlp"} & set(config.recompute_modules or ())
        yield (
            lost,
            f"recompute_modules={sorted(lost)}",
            "these are re-run by the stock layer's forward, which hyper-connections replace",
            "use recompute_modules=['core_attn'] (also moe_act, moe, mla_up_proj, shared_experts) "
            "or recompute_granularity='full'",
        )
    # 0.16 says enable_cuda_graph / external_cuda_graph / cuda_graph_impl, 0.19 the last only.
    graphs = getattr(config, "cuda_graph_impl", "none")
    yield (
        graphs != "none"
        or getattr(config, "enable_cuda_graph", False)
        or getattr(config, "external_cuda_graph", False),
        f"cuda_graph_impl={graphs!r}",
        "Megatron captures the stock layer's private steps, or a step that was never compared with "
        "one launched kernel by kernel",
        "set cuda_graph_impl='none' (cuda_graph=True of mhc-megatron train captures whole steps)",
    )
    offloaded = {"attn_norm", "mlp_norm"} & set(getattr(config, "offload_modules", None) or ())
    yield (
        getattr(config, "fine_grained_activation_offloading", False) and offloaded,
        f"offload_modules={sorted(offloaded)}",
        "the norms are offloaded by the stock layer's forward",
        "leave the norms out of offload_modules",
    )
    yield (
        getattr(config, "inference_fuse_tp_communication", False),
        "inference_fuse_tp_communication=True",
        "it adds the residual inside the branch",
        "set it to False",
    )
    for option in ("mlp_chunks_for_prefill", "mlp_chunks_for_training"):
        chunks = getattr(config, option, 1)
        yield (
            chunks > 1,
            f"{option}={chunks}",
            "the MLP is chunked by the stock layer's forward",
            f"set {option}=1",
        )
    yield (
        getattr(config, "overlap_moe_expert_parallel_comm", False),
        "overlap_moe_expert_parallel_comm=True",
        "its schedule drives the stock layer's private steps",
        "set it to False",
    )


def reject_unsupported_recompute(config: TransformerConfig, mhc: MHCConfig) -> None:
    """Raise a UserError for the first option that breaks the hyper-connections' own recompute.

    Args:
        config: the model's configuration.
        mhc: its ``recompute`` is the policy; with ``none`` there is nothing to break.
    """
    if mhc.recompute == "none":
        return
    if config.recompute_granularity == "full":
        mhc.reject_recompute_of_layers(
            "recompute_granularity='full'",
            "set recompute='none', or recompute_granularity='selective'",
        )
    refusals = (
        (
            config.cpu_offloading,
            "cpu_offloading=True",
            "it copies states that are dropped meanwhile",
            "set it to False, or recompute='none'",
        ),
        (
            config.fine_grained_activation_offloading,
            "fine_grained_activation_offloading=True",
            "it copies branch inputs that are dropped meanwhile",
            "set it to False, or recompute='none'",
        ),
        (
            config.enable_autocast,
            "enable_autocast=True",
            "norms would be run again outside autocast, in another dtype",
            "set it to False, or recompute='none'",
        ),
    )
    refuse_first(f"recompute={mhc.recompute!r} of the hyper-connections", refusals)


def reject_unsupported_single_pass(config: TransformerConfig, mhc: MHCConfig) -> None:
    """Raise a UserError for what replaces the hidden states between single-pass layers.

    Args:
        config: the model's configuration.
        mhc: its ``variant``; ``two_pass`` reads any hidden states again.
    """
    if mhc.variant == "single_pass" and config.cpu_offloading:
        raise UserError(
            "cpu_offloading=True does not combine with variant='single_pass' of the "
            "hyper-connections: it replaces the hidden states between layers, and with them the "
            "branch's input that was handed over; set it to False, or variant='two_pass'"
        )
