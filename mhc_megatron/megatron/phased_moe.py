"""Megatron's MoE layer phase by phase."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

Begin = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Keeper:
    """What a token dispatcher hands from one phase to another by itself, beside the graph.

    Args:
        owner: has it as attributes.
        tensors: by phase, the names of what is read there and was made in an earlier one.
        probs: by phase, the name under which the probabilities are read there, instead of those
            that the call is given.
    """

    owner: Any
    tensors: Mapping[str, tuple[str, ...]]
    probs: Mapping[str, str] = field(default_factory=dict)

    def read_in(self, phase: str) -> tuple[Tensor | None, ...]:
        """``used`` of ``PhaseMarker.begin``."""
        return tuple(getattr(self.owner, name) for name in self.tensors.get(phase, ()))

    def take_probs(self, phase: str, probs: Tensor) -> None:
        """Let the phase read those that ``begin`` returned, whose gradient passes it."""
        if phase in self.probs:
            setattr(self.owner, self.probs[phase], probs)


def _of_alltoall(dispatcher: Any) -> Keeper:
    mapping = ("reversed_local_input_permutation_mapping", "routing_map")
    return Keeper(dispatcher, {"unpermute": mapping})


def _of_deepep(dispatcher: Any) -> Keeper:
    # DeepEP's handle is made, and read again, on the communication lane only.
    return Keeper(
        dispatcher._comm_manager,
        {"dispatch": ("token_indices",), "experts": ("dispatched_indices",)},
        {"dispatch": "token_probs", "experts": "dispatched_probs"},
    )


# By moe_token_dispatcher_type; of flex, the backend deepep.
_KEEPERS: dict[str, Callable[[Any], Keeper]] = {"alltoall": _of_alltoall, "flex": _of_deepep}


def run_moe(moe: MoELayer, hidden: Tensor, padding_mask: Tensor | None, begin: Begin) -> Tensor:
    """What ``MoELayer.forward`` computes in training, in its order, with ``MOE_PHASES`` between.

    Args:
        moe: with none of what ``reject_unsupported_overlap`` names.
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
    keeper = _KEEPERS[moe.config.moe_token_dispatcher_type](moe.token_dispatcher)
    tokens, probs, *with_shared = begin(
        "dispatch", tokens, probs, *_if_any(shared), used=keeper.read_in("dispatch")
    )
    keeper.take_probs("dispatch", probs)
    tokens, probs = moe.dispatch(tokens, probs)
    tokens, probs = begin("experts", tokens, probs, used=keeper.read_in("experts"))
    keeper.take_probs("experts", probs)
    output, bias = moe.routed_experts_compute(tokens, probs)
    assert bias is None, f"{type(moe.token_dispatcher).__name__} with a bias"
    (output,) = begin("combine", output)
    output = moe.combine(output)
    used = *keeper.read_in("unpermute"), *with_shared
    (output,) = begin("unpermute", output, used=used)
    result: Tensor = moe.postprocess(output, with_shared[0] if with_shared else None)
    return result


def _if_any(tensor: Tensor | None) -> tuple[Tensor, ...]:
    return () if tensor is None else (tensor,)
