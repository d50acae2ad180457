"""Megatron's MoE layer phase by phase."""

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

Begin = Callable[..., tuple[Tensor, ...]]


def run_moe(moe: MoELayer, hidden: Tensor, padding_mask: Tensor | None, begin: Begin) -> Tensor:
    """What ``MoELayer.forward`` computes in training, in its order, with ``MOE_PHASES`` between.

    Args:
        moe: with the all-to-all dispatcher, and none of what ``reject_unsupported_overlap`` names.
        hidden: [s, b, C], in the phase ``router``.
        padding_mask: [b, s] as ``MoELayer.forward`` takes it.
        begin: ``PhaseMarker.begin``.

    Returns:
        [s, b, C], in the phase ``unpermute``.
    """
    if padding_mask is not None:
        padding_mask = padding_mask.transpose(0, 1).bool()
    shared: Any = moe.shared_experts_compute(hidden)
    probs, routing_map = moe.route(hidden, padding_mask)
    tokens, probs = moe.preprocess(hidden, probs, routing_map)
    tokens, probs = begin("dispatch", tokens, probs)
    tokens, probs = moe.dispatch(tokens, probs)
    tokens, probs = begin("experts", tokens, probs)
    output, bias = moe.routed_experts_compute(tokens, probs)
    assert bias is None, f"{type(moe.token_dispatcher).__name__} with a bias"
    (output,) = begin("combine", output)
    output = moe.combine(output)
    (output,) = begin("unpermute", output)
    result: Tensor = moe.postprocess(output, shared)
    return result
