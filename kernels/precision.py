"""The arithmetic of the coefficients: float32 or wider, whatever the streams and autocast are."""

import torch
from torch import Tensor


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 if one of the tensors is float64."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in the operands' own dtype, which autocast would narrow."""
    with torch.autocast(left.device.type, enabled=False):
        return torch.matmul(left, right)
