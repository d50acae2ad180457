"""Megatron's transformer layer with a hyper-connection around each of its two branches."""

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.hyper_connection import HyperConnection
from mhc_megatron.megatron.norm import tag_sequence_parallel
from mhc_megatron.megatron.unsupported import reject_unsupported
from mhc_megatron.streams import expand_streams

# What Megatron's blocks pass to a layer for its attention.
_ATTENTION_ARGUMENTS = (
    "inference_context",
    "rotary_pos_emb",
    "rotary_pos_cos",
    "rotary_pos_sin",
    "rotary_pos_cos_sin",
    "attention_bias",
    "packed_seq_params",
    "sequence_len_offset",
)


class MHCTransformerLayer(TransformerLayer):
    """Attention and MLP (or MoE), each inside a hyper-connection; hidden states are [s, b, n*C].

    Built from a stock layer spec by ``with_hyper_connections``. Only ``forward`` is overridden;
    it calls the parent's public submodules and none of its private steps.

    Args:
        config, submodules: as for ``TransformerLayer``; remaining arguments are passed on.
        mhc: the hyper-connections' configuration.
        expand_input: True for the model's first layer, whose input is the embedding [s, b, C].

    Raises:
        UserError: the configuration asks for something this layer would have to ignore.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *args: Any,
        mhc: MHCConfig,
        expand_input: bool = False,
        **kwargs: Any,
    ) -> None:
        reject_unsupported(config, submodules)
        super().__init__(config, submodules, *args, **kwargs)
        self.mhc = mhc
        self.expand_input = expand_input
        first = 2 * (self.layer_number - 1)
        self.self_attention_hyper_connection = HyperConnection(
            mhc, hidden_size=config.hidden_size, sublayer=first
        )
        self.mlp_hyper_connection = HyperConnection(
            mhc, hidden_size=config.hidden_size, sublayer=first + 1
        )
        tag_sequence_parallel(self.self_attention_hyper_connection, config)
        tag_sequence_parallel(self.mlp_hyper_connection, config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        *,
        padding_mask: Tensor | None = None,
        **attention_arguments: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Both sublayers.

        Args:
            hidden_states: [s, b, n*C], or [s, b, C] with ``expand_input`` (s is the local shard
                under sequence or context parallelism).
            attention_mask, padding_mask, attention_arguments: as for ``TransformerLayer.forward``.
            context, context_mask: unused, there is no cross attention.

        Returns:
            ([s, b, n*C], context).
        """
        packed = attention_arguments.get("packed_seq_params")
        if self.is_moe_layer and getattr(packed, "tokens_per_sample", None) is not None:
            raise UserError(
                "packed_seq_params.tokens_per_sample with MoE layers needs the batch dimension "
                "restored before the router, which hyper-connections do not do; use "
                "micro_batch_size=1 or dense layers"
            )
        streams = hidden_states
        if self.expand_input:
            streams = expand_streams(hidden_states, self.mhc.num_streams)

        attention, mlp = self.self_attention_hyper_connection, self.mlp_hyper_connection
        branch_input, mix = attention.pre(streams)
        output, bias = self.self_attention(
            _single(self.input_layernorm(branch_input), "input_layernorm"),
            attention_mask=attention_mask,
            **{name: attention_arguments.get(name) for name in _ATTENTION_ARGUMENTS},
        )
        streams, branch_input, mix = attention.post_pre(streams, output, mix, mlp, branch_bias=bias)

        output, bias = self.mlp(
            _single(self.pre_mlp_layernorm(branch_input), "pre_mlp_layernorm"),
            padding_mask=padding_mask,
        )
        streams = mlp.post(streams, output, mix, branch_bias=bias)

        # Megatron frees a stage's output after sending it and refuses to free a view.
        streams = make_viewless_tensor(
            inp=streams, requires_grad=streams.requires_grad, keep_graph=True
        )
        return streams, context


def _single(normed: Tensor | tuple, name: str) -> Tensor:
    """A norm may hand its input back as the residual (0.19); streams are the residual here."""
    if isinstance(normed, tuple):
        raise UserError(
            f"{name} returns (output, residual); hyper-connections need a norm that returns its "
            "output alone: use the stock layer spec's norm"
        )
    return normed
