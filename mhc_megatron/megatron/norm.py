"""Norms for Megatron's specs: the contraction before the final norm, and a local norm under SP."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn

from mhc_megatron.branch_norm import BranchNorm
from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.streams import Contraction


def tag_sequence_parallel(module: nn.Module, config: TransformerConfig) -> None:
    """Mark parameters that every TP rank holds whole but feeds only its sequence shard.

    Megatron's ``finalize_model_grads`` sums the gradients of exactly the parameters marked so.
    """
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class TorchNorm:
    """PyTorch's LayerNorm or RMSNorm for local specs, under sequence parallelism too.

    megatron-core's own ``WrappedTorchNorm`` refuses sequence parallelism; here the parameters
    carry Megatron's tag instead, so their gradients are summed over TP.
    """

    # A class, as in megatron-core itself: build_module takes a function for a finished module.
    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> nn.Module:
        if config.layernorm_zero_centered_gamma:
            raise UserError(
                "layernorm_zero_centered_gamma=True needs Transformer Engine or apex norms; "
                "set it to False or use transformer_impl='transformer_engine'"
            )
        kinds = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": BranchNorm}
        if config.normalization not in kinds:
            raise UserError(
                f"normalization={config.normalization!r} is not one of {', '.join(kinds)}"
            )
        norm = kinds[config.normalization](normalized_shape=hidden_size, eps=eps)
        tag_sequence_parallel(norm, config)
        return norm


class ContractNorm(nn.Module):
    """The final norm of an n-stream model: contract the streams, then norm.

    It stands in ``TransformerBlockSubmodules.layer_norm``, which Megatron builds on the stage that
    holds the last decoder layer. In a distributed checkpoint the norm's own entries keep the names
    they have in a plain model (``decoder.final_layernorm.weight``).
    """

    def __init__(
        self, inner: Any, mhc: MHCConfig, config: TransformerConfig, hidden_size: int, eps: float
    ) -> None:
        super().__init__()
        self.contraction = Contraction(mhc, hidden_size=hidden_size)
        tag_sequence_parallel(self.contraction, config)
        self.norm = build_module(inner, config=config, hidden_size=hidden_size, eps=eps)

    def forward(self, streams: Tensor) -> Tensor:
        """[s, b, n*C], or what ``Contraction`` takes, to the normalised [s, b, C]."""
        return self.norm(self.contraction(streams))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Entries of a distributed checkpoint, the norm's stored under their plain names."""
        sharded: ShardedStateDict = {}
        for name, module in self.named_children():
            sharded |= sharded_state_dict_default(
                module,
                f"{prefix}{name}.",
                sharded_offsets,
                metadata,
                tp_group=parallel_state.get_tensor_model_parallel_group(),
            )
        apply_prefix_mapping(sharded, {f"{prefix}norm.": prefix})
        return sharded


def contract_norm(inner: Any, mhc: MHCConfig) -> type[ContractNorm]:
    """A class that Megatron can build in the final norm's place.

    Args:
        inner: the norm (class or ModuleSpec) of the stock block spec.
        mhc: how the streams are contracted.

    Returns:
        A class called as ``(config=, hidden_size=, eps=)``, as both 0.16 and 0.19 do.
    """

    class BoundContractNorm(ContractNorm):
        def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
            super().__init__(inner, mhc, config, hidden_size, eps)

    return BoundContractNorm
