"""What the block spec takes from the configuration."""

import pytest
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_config import TransformerConfig

from mhc_megatron.config import MHCConfig
from mhc_megatron.megatron.spec import gpt_block_spec


@pytest.mark.parametrize(("wanted", "norm"), [(True, L2Norm), (False, IdentityOp)])
def test_queries_and_keys_get_the_l2_norm_that_the_configuration_asks_for(
    wanted: bool, norm: type
) -> None:
    config = TransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=2, hidden_dropout=0.0, qk_l2_norm=wanted
    )
    block = gpt_block_spec(config, MHCConfig(), use_transformer_engine=False, pp_rank=0)
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention.submodules
        assert (attention.q_layernorm, attention.k_layernorm) == (norm, norm)
