"""Which kernels Transformer Engine computes attention with."""

import sys
from typing import Literal

AttentionKernels = Literal["flash", "fused", "unfused"]

_MODULE = "transformer_engine.pytorch.attention.dot_product_attention"


def attention_kernels() -> AttentionKernels | None:
    """Of the last attention of Transformer Engine in this process; None before the first.

    ``flash``: flash-attn's; ``fused``: cuDNN's; ``unfused``: products and a softmax in memory,
    where neither of the others can be had or takes these operands. Transformer Engine says why, and
    which, only with ``NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2``.
    """
    chosen = getattr(sys.modules.get(_MODULE), "_attention_backends", None)
    if not isinstance(chosen, dict):
        return None
    for name in ("flash", "fused", "unfused"):
        if chosen.get(f"use_{name}_attention"):
            return name
    return None
