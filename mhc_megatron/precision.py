"""Parameters that stay float32 inside a half-precision model."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class KeepFP32(nn.Module):
    """A module whose parameters are never cast below their own precision.

    Megatron's ``Float16Module`` calls ``.bfloat16()`` or ``.half()`` on the whole model; the
    hyper-connections' parameters must stay float32 (the coefficients they make are float32 from
    end to end). Moves between devices and casts to a wider dtype pass through.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def keep(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if applied.is_floating_point() and applied.dtype.itemsize < tensor.dtype.itemsize:
                # From the original, so that no bit is lost on the way through the narrow dtype.
                return tensor.to(applied.device)
            return applied

        return super()._apply(keep, recurse)


def float32_parameter(*shape: int, fill: float = 0.0) -> nn.Parameter:
    """A float32 parameter of the given shape, filled with one value, on the default device."""
    return nn.Parameter(torch.full(shape, fill, dtype=torch.float32))
