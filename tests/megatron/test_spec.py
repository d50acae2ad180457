"""What the block spec takes from the configuration."""

import pytest
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_config import TransformerConfig

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
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


def test_modules_that_cannot_be_imported_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt_layer_specs, "HAVE_TE", False)
    config = TransformerConfig(num_layers=2, hidden_size=16, num_attention_heads=2)
    with pytest.raises(UserError, match=r"needs Transformer Engine, .*; install .*='local'"):
        gpt_block_spec(config, None, use_transformer_engine=True, pp_rank=0)
