"""Stock GPT layer specs with hyper-connections around every branch."""

import dataclasses
from typing import Any

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    get_transformer_layer_offset,
)

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.megatron.chain import ChainBuilder
from mhc_megatron.megatron.compat import require_supported_core
from mhc_megatron.megatron.layer import MHCTransformerLayer
from mhc_megatron.megatron.local_attention import LocalMLACoreAttention
from mhc_megatron.megatron.norm import TorchNorm, contract_norm


def with_hyper_connections(
    block: TransformerBlockSubmodules, mhc: MHCConfig, *, holds_first_layer: bool
) -> TransformerBlockSubmodules:
    """Put one hyper-connection around each branch of every layer of a stock block spec.

    Args:
        block: the spec of one pipeline stage (or virtual stage), for example from
            ``get_gpt_decoder_block_spec``; dense, MoE or MLA, local or Transformer Engine.
        mhc: the hyper-connections' configuration.
        holds_first_layer: True if the model's first layer is in this block; its layer expands the
            embedding into the streams.

    Returns:
        A new spec; the argument is unchanged.

    Raises:
        UserError: a stage without a decoder layer, a layer that is not a ``TransformerLayer``, or
            fewer sublayers in the stage than in a recompute block.
    """
    require_supported_core()
    if not block.layer_specs:
        raise UserError(
            "a pipeline stage without decoder layers would pass [s, b, C] where its neighbours "
            "pass n streams; give every (virtual) stage at least one layer"
        )
    chain = ChainBuilder(mhc, num_layers=len(block.layer_specs))
    return dataclasses.replace(
        block,
        layer_specs=[
            _with_hyper_connections(spec, mhc, chain, position=index, is_first=holds_first_layer)
            for index, spec in enumerate(block.layer_specs)
        ],
        layer_norm=contract_norm(block.layer_norm, mhc),
    )


def _with_hyper_connections(
    spec: ModuleSpec, mhc: MHCConfig, chain: ChainBuilder, *, position: int, is_first: bool
) -> ModuleSpec:
    if spec.module is not TransformerLayer:
        raise UserError(
            f"layer spec of {getattr(spec.module, '__name__', spec.module)} cannot take "
            "hyper-connections; start from a spec of megatron-core's TransformerLayer"
        )
    params = {
        **spec.params,
        "mhc": mhc,
        "chain": chain,
        "position": position,
        "expand_input": is_first and position == 0,
    }
    return dataclasses.replace(spec, module=MHCTransformerLayer, params=params)


def gpt_block_spec(
    config: TransformerConfig,
    mhc: MHCConfig | None,
    *,
    use_transformer_engine: bool,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """The decoder block spec of one (virtual) pipeline stage of a GPT model.

    Args:
        config: the model's configuration.
        mhc: the hyper-connections; None leaves Megatron's plain residual.
        use_transformer_engine: Transformer Engine modules instead of megatron-core's local ones.
        vp_stage, pp_rank: which stage; Megatron's own by default.

    Returns:
        The spec to hand to ``GPTModel(transformer_layer_spec=...)``.

    Raises:
        UserError: Transformer Engine cannot be imported, or as ``with_hyper_connections``.
    """
    block = _stock_block_spec(config, use_transformer_engine, vp_stage, pp_rank)
    if mhc is None:
        return block
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return with_hyper_connections(block, mhc, holds_first_layer=offset == 0)


def block_of_layers(
    spec: ModuleSpec | TransformerBlockSubmodules,
    config: TransformerConfig,
    *,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """What ``GPTModel`` makes of a layer spec: one (virtual) stage of layers, and a final norm.

    Source: ``megatron.core.transformer.transformer_block._get_block_submodules``. Local norms also
    take sequence parallelism.

    Args:
        spec: one layer's, repeated for every layer of the stage; or a whole block's, kept.
        config: the model's configuration.
        vp_stage: the virtual stage that is built.
    """
    if isinstance(spec, ModuleSpec):
        num_layers = get_num_layers_to_build(config, vp_stage)
        spec = TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=LayerNormImpl)
    block: TransformerBlockSubmodules = _completed(spec)
    return block


def gpt_mtp_spec(
    config: TransformerConfig,
    *,
    use_transformer_engine: bool,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> Any:
    """The multi-token-prediction block spec of this stage, or None.

    Megatron feeds its MTP layers the contracted, normalised state, so they keep the plain
    residual; their spec comes from the stock block.
    """
    if config.mtp_num_layers is None:
        return None
    spec = get_gpt_mtp_block_spec(
        config,
        _stock_block_spec(config, use_transformer_engine, vp_stage, pp_rank),
        use_transformer_engine=use_transformer_engine,
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    return spec if use_transformer_engine else _completed(spec)


def _stock_block_spec(
    config: TransformerConfig,
    use_transformer_engine: bool,
    vp_stage: int | None,
    pp_rank: int | None,
) -> TransformerBlockSubmodules:
    if use_transformer_engine and not gpt_layer_specs.HAVE_TE:
        raise UserError(
            "transformer_impl='transformer_engine' needs Transformer Engine, which cannot be "
            "imported here; install transformer-engine[pytorch] (docs/install.md), or use "
            "transformer_impl='local'"
        )
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=use_transformer_engine,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    return block if use_transformer_engine else _completed(block)


def _completed(spec: Any) -> Any:
    """A local spec that also does what megatron-core's local modules refuse: SP norms and MLA."""
    if spec is WrappedTorchNorm:
        return TorchNorm
    if isinstance(spec, MLASelfAttentionSubmodules) and spec.core_attention is DotProductAttention:
        spec = dataclasses.replace(spec, core_attention=LocalMLACoreAttention)
    if isinstance(spec, list):
        return [_completed(item) for item in spec]
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        fields = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.init}
        changed = {name: _completed(value) for name, value in fields.items()}
        return dataclasses.replace(spec, **changed)
    return spec
