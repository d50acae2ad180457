"""Blocks of Transformer Engine's modules with hyper-connections, for models without Megatron.

Megatron's users take ``megatron.spec`` instead, which puts the same connections around its layers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mhc_megatron.config import MHCConfig
from mhc_megatron.cudnn import load_torchs_cudnn
from mhc_megatron.errors import UserError
from mhc_megatron.hyper_connection import HyperConnection, Mix
from mhc_megatron.recompute import ForwardRecompute, StreamRecompute
from mhc_megatron.streams import Contraction, expand_streams


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """The branches of a block.

    Attributes:
        hidden_size, ffn_hidden_size: C, and the width of the gated MLP.
        num_attention_heads: query heads.
        num_query_groups: key/value heads; None means one per query head.
        norm_eps: of the RMSNorms inside the branches.
        activation: of the MLP, by Transformer Engine's name.
        attn_mask_type: Transformer Engine's.
        params_dtype: of the branches; the hyper-connections' own parameters are float32.
        device: of all parameters.
    """

    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int | None = None
    norm_eps: float = 1e-5
    activation: str = "swiglu"
    attn_mask_type: str = "causal"
    params_dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"


class TEBlock(nn.Module):
    """Attention and MLP of Transformer Engine, a hyper-connection around each.

    Both branches begin with an RMSNorm that is fused with their first product, which under
    ``transformer_engine.pytorch.autocast`` is where FP8 begins; the streams stay in their dtype.

    Args:
        config: of the branches.
        mhc: of the hyper-connections; ``recompute`` is for ``TEStack``.
        index: zero-based depth in the model.

    Raises:
        UserError: Transformer Engine is not installed, or ``mhc.variant="single_pass"``.
    """

    def __init__(self, config: BlockConfig, mhc: MHCConfig, *, index: int) -> None:
        super().__init__()
        engine = _transformer_engine()
        if mhc.variant == "single_pass":
            raise UserError(
                "variant='single_pass' is for Megatron's layers (megatron.spec); use "
                "variant='two_pass' with TEBlock"
            )
        shared = {
            "bias": False,
            "normalization": "RMSNorm",
            "params_dtype": config.params_dtype,
            "device": config.device,
        }
        self.attention = engine.MultiheadAttention(
            config.hidden_size,
            config.num_attention_heads,
            num_gqa_groups=config.num_query_groups,
            attention_dropout=0.0,
            layernorm_epsilon=config.norm_eps,
            layer_number=index + 1,
            attn_mask_type=config.attn_mask_type,
            input_layernorm=True,
            fuse_qkv_params=True,
            **shared,
        )
        self.mlp = engine.LayerNormMLP(
            config.hidden_size,
            config.ffn_hidden_size,
            eps=config.norm_eps,
            activation=config.activation,
            **shared,
        )
        self.attention_hyper_connection, self.mlp_hyper_connection = (
            HyperConnection(mhc, hidden_size=config.hidden_size, sublayer=sublayer).to(
                config.device
            )
            for sublayer in (2 * index, 2 * index + 1)
        )

    def forward(self, streams: Tensor, **attention_arguments: Any) -> Tensor:
        """The block by itself; in a ``TEStack`` blocks hand over to each other in one pass.

        Args:
            streams: [s, b, n*C].
            attention_arguments: as ``rotary_pos_emb``, for ``MultiheadAttention.forward``;
                ``is_first_microbatch`` goes to both branches.

        Returns:
            [s, b, n*C], the same dtype.
        """
        branch_input, mix = self.attention_hyper_connection.pre(streams)
        return self.run(streams, branch_input, mix, None, None, **attention_arguments)[0]

    def run(
        self,
        streams: Tensor,
        branch_input: Tensor,
        mix: Mix,
        following: "TEBlock | None",
        recompute: ForwardRecompute | None,
        *,
        sublayer: int = 0,
        **attention_arguments: Any,
    ) -> tuple[Tensor, Tensor, Mix]:
        """Both sublayers, and the next block's ``pre``.

        Args:
            streams: [s, b, n*C].
            branch_input, mix: [s, b, C] and the mappings, from this block's first ``pre``.
            following: the next block; None behind the last.
            recompute: told of what can be dropped; None for nobody.
            sublayer: of this block's attention in the stack, for ``recompute``.
            attention_arguments: as for ``forward``.

        Returns:
            The streams, and ``branch_input`` and ``mix`` for the next block (this one's, used up,
            if there is none).
        """
        output = self.attention(branch_input, **attention_arguments)
        before = streams
        _branch_done(recompute, sublayer, streams, branch_input, output, mix)
        streams, branch_input, mix = self.attention_hyper_connection.post_pre(
            streams, output, mix, self.mlp_hyper_connection
        )
        _streams_done(recompute, sublayer, before, streams)
        first = attention_arguments.get("is_first_microbatch")
        output = self.mlp(branch_input, is_first_microbatch=first)
        before = streams
        _branch_done(recompute, sublayer + 1, streams, branch_input, output, mix)
        if following is None:
            streams = self.mlp_hyper_connection.post(streams, output, mix)
        else:
            streams, branch_input, mix = self.mlp_hyper_connection.post_pre(
                streams, output, mix, following.attention_hyper_connection
            )
        _streams_done(recompute, sublayer + 1, before, streams)
        return streams, branch_input, mix


class TEStack(nn.Module):
    """Blocks between an embedding and a final norm, with one pass over the streams between two.

    Args:
        config: of the branches.
        mhc: of the hyper-connections; with ``recompute`` the streams inside a block of sublayers
            are dropped after the forward and rebuilt before the backward.
        num_layers: blocks.

    Raises:
        UserError: as for ``TEBlock``, or ``mhc.recompute_block`` is above 2 ``num_layers``.
    """

    def __init__(self, config: BlockConfig, mhc: MHCConfig, *, num_layers: int) -> None:
        super().__init__()
        self.mhc = mhc
        self.blocks = nn.ModuleList(TEBlock(config, mhc, index=i) for i in range(num_layers))
        self.contraction = Contraction(mhc, hidden_size=config.hidden_size).to(config.device)
        self._recompute = None
        if mhc.recompute != "none":
            self._recompute = StreamRecompute(mhc, num_sublayers=2 * num_layers)

    def forward(self, hidden: Tensor, **attention_arguments: Any) -> Tensor:
        """The embedding [s, b, C] to what the final norm takes, [s, b, C].

        Args:
            hidden: any floating dtype; with ``contraction="sum"`` the norm removes the factor n.
            attention_arguments: as for ``TEBlock``.
        """
        streams = expand_streams(hidden, self.mhc.num_streams, backend=self.mhc.backend)
        blocks: list[Any] = list(self.blocks)
        branch_input, mix = blocks[0].attention_hyper_connection.pre(streams)
        recompute = None
        if self._recompute is not None and torch.is_grad_enabled():
            self._recompute.begin()
            recompute = self._recompute.take()  # from now on it lives as long as the graph
        for index, (block, following) in enumerate(zip(blocks, [*blocks[1:], None], strict=True)):
            streams, branch_input, mix = block.run(
                streams,
                branch_input,
                mix,
                following,
                recompute,
                sublayer=2 * index,
                **attention_arguments,
            )
        return self.contraction(streams)


def _branch_done(
    recompute: ForwardRecompute | None,
    sublayer: int,
    streams: Tensor,
    branch_input: Tensor,
    output: Tensor,
    mix: Mix,
) -> None:
    if recompute is not None:
        recompute.branch_done(
            sublayer,
            streams=streams,
            branch_input=branch_input,
            normed=branch_input,  # the norm is inside the branch
            norm=nn.Identity(),
            output=output,
            bias=None,
            mix=mix,
        )


def _streams_done(
    recompute: ForwardRecompute | None, sublayer: int, before: Tensor, streams: Tensor
) -> None:
    if recompute is not None:
        recompute.streams_done(sublayer, streams=before, new_streams=streams)


def _transformer_engine() -> Any:
    load_torchs_cudnn()
    try:
        import transformer_engine.pytorch as engine
    except ImportError as error:
        raise UserError(
            "TEBlock needs Transformer Engine, which is not installed; install "
            "transformer-engine[pytorch]"
        ) from error
    return engine
