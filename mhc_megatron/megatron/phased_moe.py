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
        begin: ``PhaseMarker.begin``. What shared experts made goes past the exchanges.

    Returns:
        [s, b, C], in the phase ``unpermute``.
    """
    if padding_mask is not None:
        padding_mask = padding_mask.transpose(0, 1).bool()
    shared: Any = moe.shared_experts_compute(hidden)
    probs, routing_map = moe.route(hidden, padding_mask)
    tokens, probs = moe.preprocess(hidden, probs, routing_map)
    tokens, probs, *with_shared = begin("dispatch", tokens, probs, *_if_any(shared))
    tokens, probs = moe.dispatch(tokens, probs)
    tokens, probs = begin("experts", tokens, probs)
    output, bias = moe.routed_experts_compute(tokens, probs)
    assert bias is None, f"{type(moe.token_dispatcher).__name__} with a bias"
    (output,) = begin("combine", output)
    output = moe.combine(output)
    dispatcher: Any = moe.token_dispatcher
    where = dispatcher.reversed_local_input_permutation_mapping, dispatcher.routing_map
    (output,) = begin("unpermute", output, used=(*where, *with_shared))
    result: Tensor = moe.postprocess(output, with_shared[0] if with_shared else None)
    return result


def _if_any(tensor: Tensor | None) -> tuple[Tensor, ...]:
    return () if tensor is None else (tensor,)
