"""``--spec helpers.plain_spec gpt``: our layer specs without hyper-connections, for a baseline."""

from typing import Any

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from mhc_megatron.megatron.spec import gpt_block_spec


def gpt(model_config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The plain block spec of a GPTModel, called by Megatron's builder."""
    config = model_config.transformer
    return gpt_block_spec(config, None, use_transformer_engine=False, vp_stage=vp_stage)
