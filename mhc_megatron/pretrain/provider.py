"""Hyper-connections for a dataclass that provides a GPTModel, as Megatron-Bridge's does."""

import inspect
from functools import partial
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.megatron.p2p import reject_mixed_up_messages
from mhc_megatron.megatron.spec import block_of_layers, with_hyper_connections
from mhc_megatron.pretrain.buffers import float32_buffers_first
from mhc_megatron.refusals import refuse_first


def hyper_connect_provider(provider: Any, mhc: MHCConfig) -> None:
    """Put hyper-connections into the GPTModel that ``provider.provide`` will build.

    The layers are those of the provider's own ``transformer_layer_spec``. Where the pipeline has
    more than one rank, ``variable_seq_lengths`` is turned on: a provider cannot reach the
    communicator, so the ranks send each other the shape before every message.

    Args:
        provider: a TransformerConfig with ``transformer_layer_spec`` (a spec, or a callable of the
            provider and, if it has that parameter, ``vp_stage``) and ``register_post_wrap_hook``.
        mhc: the hyper-connections.

    Raises:
        UserError: ``provider`` has no ``transformer_layer_spec`` (a Mamba or hybrid provider). What
            does not combine is refused when the model is built, as options may be set until then.
    """
    if not hasattr(provider, "transformer_layer_spec"):
        raise UserError(
            f"{type(provider).__name__} has no transformer_layer_spec: hyper-connections are built "
            "around the two branches of TransformerLayer; use a provider of GPTModel"
        )
    provider.transformer_layer_spec = partial(_spec, provider.transformer_layer_spec, mhc)
    provider.register_post_wrap_hook(float32_buffers_first)


def _spec(
    layers: Any, mhc: MHCConfig, provider: Any, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    _reject_options(provider)
    num_ranks = provider.pipeline_model_parallel_size
    if num_ranks > 1:
        reject_mixed_up_messages(provider, num_ranks=num_ranks)
        provider.variable_seq_lengths = True
    if not isinstance(layers, (ModuleSpec, TransformerBlockSubmodules)):
        takes_stage = "vp_stage" in inspect.signature(layers).parameters
        layers = layers(provider, **({"vp_stage": vp_stage} if takes_stage else {}))
    block = block_of_layers(layers, provider, vp_stage=vp_stage)
    offset = get_transformer_layer_offset(provider, vp_stage=vp_stage)
    return with_hyper_connections(block, mhc, holds_first_layer=offset == 0)


def _reject_options(provider: Any) -> None:
    virtual = provider.virtual_pipeline_model_parallel_size
    backend = getattr(provider.attention_backend, "name", None)
    num_ranks = provider.pipeline_model_parallel_size
    allgather = provider.moe_token_dispatcher_type == "allgather"
    refusals = (
        (
            getattr(provider, "use_transformer_engine_op_fuser", False),
            "use_transformer_engine_op_fuser=True",
            "its fused layers are not tested with them",
            "set it to False",
        ),
        (
            getattr(provider, "use_transformer_engine_full_layer_spec", False),
            "use_transformer_engine_full_layer_spec=True",
            "Transformer Engine's whole layer adds the residual itself",
            "set it to False",
        ),
        (
            getattr(provider, "restore_modelopt_state", False),
            "restore_modelopt_state=True",
            "ModelOpt's layers are not tested with them",
            "set it to False",
        ),
        (
            provider.mtp_num_layers,
            f"mtp_num_layers={provider.mtp_num_layers}",
            "the provider would build the prediction layers from the same spec, and they keep the "
            "plain residual",
            "set it to None",
        ),
        (
            backend == "local",
            "attention_backend=local",
            "the provider sets it in a spec of one layer, and they need a block's",
            "choose a local transformer_layer_spec instead",
        ),
        (
            (provider.bf16 or provider.fp16) and virtual,
            f"half precision with virtual_pipeline_model_parallel_size={virtual}",
            "the distributed optimizer would save a parameter the state of another",
            "use one stage per rank",
        ),
        (
            num_ranks > 1 and provider.num_moe_experts is not None and allgather,
            "moe_token_dispatcher_type='allgather' in a pipeline",
            "it needs one shape for all messages",
            "use alltoall",
        ),
    )
    refuse_first("hyper-connections", refusals)
