"""Megatron's transformer layer with a hyper-connection around each of its two branches."""

from functools import partial
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn

from mhc_megatron.branch_norm import BranchNorm
from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.fp8 import reject_unsupported_precision, reject_weights
from mhc_megatron.hyper_connection import (
    HyperConnection,
    Mix,
    graph_of,
    normalises,
    tensors_of,
    with_graph,
)
from mhc_megatron.megatron.chain import ChainBuilder
from mhc_megatron.megatron.engine import engine_weights, this_platform
from mhc_megatron.megatron.norm import tag_sequence_parallel
from mhc_megatron.megatron.phased_moe import run_moe
from mhc_megatron.megatron.phased_tensor import Branch
from mhc_megatron.megatron.unsupported import (
    reject_unsupported,
    reject_unsupported_recompute,
    reject_unsupported_single_pass,
)
from mhc_megatron.streams import expand_streams, join_hidden, split_hidden

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

    With ``mhc.variant="single_pass"`` what enters and leaves a block is [s, b, (n + 1)*C]: the
    streams and the next branch's input, which the receiver cannot compute (``join_hidden``).

    Built from a stock layer spec by ``with_hyper_connections``. Only ``forward`` is overridden;
    it calls the parent's public submodules and none of its private steps.

    Attributes:
        hands_over: ends in one pass with the next layer's beginning, which is not cut off.

    Args:
        config, submodules: as for ``TransformerLayer``; remaining arguments are passed on.
        mhc: the hyper-connections' configuration.
        chain: shared by the layers of the block; None for a layer by itself.
        position: the layer's place in the block.
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
        chain: ChainBuilder | None = None,
        position: int = 0,
        expand_input: bool = False,
        **kwargs: Any,
    ) -> None:
        reject_unsupported(config, submodules)
        reject_unsupported_recompute(config, mhc)
        reject_unsupported_precision(config, this_platform())
        reject_unsupported_single_pass(config, mhc)
        super().__init__(config, submodules, *args, **kwargs)
        reject_weights(config, engine_weights(self))
        self.mhc = mhc
        self.expand_input = expand_input
        first = 2 * (self.layer_number - 1)
        connection = partial(
            HyperConnection,
            mhc,
            hidden_size=config.hidden_size,
            gradient_accumulation_fusion=config.gradient_accumulation_fusion,
        )
        self.self_attention_hyper_connection = connection(sublayer=first)
        self.mlp_hyper_connection = connection(sublayer=first + 1)
        tag_sequence_parallel(self.self_attention_hyper_connection, config)
        tag_sequence_parallel(self.mlp_hyper_connection, config)
        self.chain = (chain or ChainBuilder(mhc, num_layers=1)).join(self, position)
        self._first_in_block = 2 * position
        # A checkpointed layer returns its outputs alone.
        self.hands_over = config.recompute_granularity != "full"

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
                under sequence or context parallelism); under ``single_pass`` [s, b, (n + 1)*C],
                or [s, b, n*C] handed over by the chain.
            attention_mask, padding_mask, attention_arguments: as for ``TransformerLayer.forward``.
            context, context_mask: unused, there is no cross attention.

        Returns:
            ([s, b, n*C], context); under ``single_pass`` [s, b, (n + 1)*C] at a block's end.
        """
        packed = attention_arguments.get("packed_seq_params")
        if self.is_moe_layer and getattr(packed, "tokens_per_sample", None) is not None:
            raise UserError(
                "packed_seq_params.tokens_per_sample with MoE layers needs the batch dimension "
                "restored before the router, which hyper-connections do not do; use "
                "micro_batch_size=1 or dense layers"
            )
        streams, branch_input, mix = self._enter(hidden_states)
        attention, mlp = self.self_attention_hyper_connection, self.mlp_hyper_connection
        recompute, sublayer = self.chain.forward_recompute(self), self._first_in_block
        normed = branch_input
        if not normalises(mix):
            normed = _single(self.input_layernorm(branch_input), "input_layernorm")
        normed, streams, mix = self._begin_branch("attention", normed, streams, mix)
        attend = partial(
            self.self_attention,
            attention_mask=attention_mask,
            **{name: attention_arguments.get(name) for name in _ATTENTION_ARGUMENTS},
        )
        output, bias = self._run_branch("attention", attend, normed)
        if recompute is not None:
            recompute.branch_done(
                sublayer,
                streams=streams,
                branch_input=branch_input,
                normed=normed,
                norm=self.input_layernorm,
                output=output,
                bias=bias,
                mix=mix,
            )
        before = streams
        (output,) = self.chain.begin("attention_post", output, used=(streams, *tensors_of(mix)))
        streams, branch_input, mix = attention.post_pre(
            streams,
            output,
            mix,
            mlp,
            branch_bias=bias,
            norm=self._inside(self.pre_mlp_layernorm),
        )
        if recompute is not None:
            recompute.streams_done(sublayer, streams=before, new_streams=streams)

        sublayer += 1
        normed = branch_input
        if not normalises(mix):
            normed = _single(self.pre_mlp_layernorm(branch_input), "pre_mlp_layernorm")
        phase = "router" if self.is_moe_layer else "mlp"
        normed, streams, mix = self._begin_branch(phase, normed, streams, mix)
        output, bias = self._run_mlp(normed, padding_mask)
        if recompute is not None:
            recompute.branch_done(
                sublayer,
                streams=streams,
                branch_input=branch_input,
                normed=normed,
                norm=self.pre_mlp_layernorm,
                output=output,
                bias=bias,
                mix=mix,
            )
        before = streams
        (output,) = self.chain.begin("mlp_post", output, used=(streams, *tensors_of(mix)))
        following = self.chain.after(self) if self.hands_over else None
        if following is None:
            streams = mlp.post(streams, output, mix, branch_bias=bias)
            if self.mhc.variant == "single_pass":
                streams = join_hidden(streams, mlp.read(streams, mix))
            streams = _viewless(streams)
        else:
            streams, branch_input, mix = mlp.post_pre(
                streams,
                output,
                mix,
                following.self_attention_hyper_connection,
                branch_bias=bias,
                norm=self._inside(following.input_layernorm),
            )
            self.chain.hand_over(streams, branch_input, mix)
        if recompute is not None:
            recompute.streams_done(sublayer, streams=before, new_streams=streams)
        if following is None and self.chain.ends_model:
            (streams,) = self.chain.begin("leave", streams)
            streams = _viewless(streams)
        return streams, context

    def _begin_branch(
        self, phase: str, normed: Tensor, streams: Tensor, mix: Mix
    ) -> tuple[Tensor, Tensor, Mix]:
        """The first phase of a branch. What its post will read goes past it, not through it.

        The gradients of that are made on post's lane. They have to come back through the boundary:
        else the lane that made streams and mappings would wait for them as soon as they are made.
        """
        if self.chain.marker is None:
            return normed, streams, mix
        if self.chain.collectives is not None and phase != "router":
            phase = self.chain.collectives.first(phase)
        normed, streams, *tensors = self.chain.begin(phase, normed, past=(streams, *graph_of(mix)))
        return normed, streams, with_graph(mix, tensors)

    def _run_branch(
        self, name: str, branch: Branch, normed: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        if self.chain.collectives is None:
            return branch(normed)
        return self.chain.collectives.run(name, branch, normed, self.chain.begin)

    def _run_mlp(self, normed: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        mlp: Branch = partial(self.mlp, padding_mask=padding_mask)
        if not self.is_moe_layer:
            return self._run_branch("mlp", mlp, normed)
        if self.chain.marker is None:
            return mlp(normed)
        return run_moe(self.mlp, normed, padding_mask, self.chain.begin), None

    def _enter(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Mix]:
        """The streams [s, b, n*C], the first branch's input [s, b, C] and its mappings."""
        handed = self.chain.take(hidden_states)
        if handed is not None:
            return hidden_states, *handed
        streams, branch_input = hidden_states, None
        if self.expand_input:
            n, backend = self.mhc.num_streams, self.mhc.backend
            streams = expand_streams(hidden_states, n, backend=backend)
        if self.mhc.variant == "single_pass":
            # Before the first sublayer there is none: its A is the one-hot vector of stream 0.
            branch_input = hidden_states
            if not self.expand_input:
                streams, branch_input = self._split(hidden_states)
        own_read, mix = self.self_attention_hyper_connection.pre(
            streams, norm=self._inside(self.input_layernorm)
        )
        return streams, own_read if branch_input is None else branch_input, mix

    def _inside(self, norm: nn.Module) -> BranchNorm | None:
        """A norm that the hyper-connection may apply; any other the layer calls itself."""
        reads_before = self.mhc.variant == "single_pass"
        return norm if isinstance(norm, BranchNorm) and not reads_before else None

    def _split(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        width = self.mhc.hidden_parts * self.config.hidden_size
        if hidden_states.shape[-1] != width:
            raise UserError(
                f"layer {self.layer_number} of a single-pass model got hidden states of width "
                f"{hidden_states.shape[-1]}, not {width}: something between the layers replaced "
                "what the layer before handed over; pass its output on as it is, or use "
                "variant='two_pass'"
            )
        return split_hidden(hidden_states, self.mhc)


def _viewless(streams: Tensor) -> Tensor:
    """Megatron frees a stage's output after sending it and refuses to free a view."""
    return make_viewless_tensor(inp=streams, requires_grad=streams.requires_grad, keep_graph=True)


def _single(normed: Tensor | tuple, name: str) -> Tensor:
    """A norm may hand its input back as the residual (0.19); streams are the residual here."""
    if isinstance(normed, tuple):
        raise UserError(
            f"{name} returns (output, residual); hyper-connections need a norm that returns its "
            "output alone: use the stock layer spec's norm"
        )
    return normed
