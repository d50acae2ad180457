"""Multi-latent attention without Transformer Engine."""

from typing import Any

from megatron.core.transformer.dot_product_attention import DotProductAttention

from mhc_megatron.errors import UserError


class LocalMLACoreAttention(DotProductAttention):
    """megatron-core's unfused attention with MLA's value width.

    ``DotProductAttention`` assumes that queries and values are equally wide, so megatron-core
    offers MLA only with Transformer Engine. The arithmetic itself needs no such assumption.

    Raises:
        UserError: under tensor parallelism, where the local modules' gradients are wrong.

    Args:
        k_channels, v_channels: width of a query/key head and of a value head. None in the first
            of the two attentions that ``MLASelfAttention`` builds, which it discards.
        args, kwargs: ``DotProductAttention``'s.
    """

    def __init__(
        self,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.tp_group.size() > 1:
            raise UserError(
                f"multi-latent attention under tensor parallelism {self.tp_group.size()} needs "
                "Transformer Engine: megatron-core's local modules do not sum the shared rotary "
                "key's gradient over TP; use transformer_impl='transformer_engine' or "
                "parallel.tensor=1"
            )
        if k_channels is not None and v_channels is not None:
            self.hidden_size_per_attention_head = k_channels
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition
