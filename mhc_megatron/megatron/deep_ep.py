"""DeepEP, with which Megatron's flex dispatcher exchanges tokens."""

import torch
from megatron.core.transformer.moe.fused_a2a import HAVE_DEEP_EP

from mhc_megatron.errors import UserError


def require_deep_ep() -> None:
    """Raise a UserError unless Megatron has DeepEP in this process, and a GPU for it."""
    for missing, what in (
        (not HAVE_DEEP_EP, "the package deep_ep (DeepEP), which cannot be imported here"),
        (not torch.cuda.is_available(), "a GPU that torch can use"),
    ):
        if missing:
            raise UserError(
                f"model.moe_token_dispatcher='flex' needs {what}; install deep_ep on a machine "
                "with GPUs, or set model.moe_token_dispatcher='alltoall'"
            )
