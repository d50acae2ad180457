"""Tensors in eight bits: float8 numbers in blocks of 128, each with a power of two as its scale.

Both activations and gradients are e4m3. The scale of a block takes care of the range, so that the
third bit of mantissa is worth more than e5m2's exponents (DeepSeek-V3, arXiv 2412.19437, section
3.3.2). Powers of two make scaling exact: the only rounding is the one to e4m3.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mhc_megatron.pipeline.fp8_size import BLOCK, packed_size

_FORMAT = torch.float8_e4m3fn
_LARGEST = 448.0  # of e4m3
_BIAS = 127  # a byte per scale is its exponent plus this: E8M0 of the OCP microscaling formats
_LEAST = -126  # the exponent of the least normal float32


def pack(tensor: Tensor) -> Tensor:
    """Round to blocks of e4m3.

    A scale is the least power of two by which no number of its block exceeds what e4m3 can hold. A
    number that is not finite becomes NaN. Not differentiable.

    Args:
        tensor: float32, bfloat16 or float16; the last dimension is whole blocks.

    Returns:
        uint8 [``packed_size``]: the numbers in the tensor's order, then the exponents plus 127.

    Raises:
        ValueError: as ``packed_size``.
    """
    size = packed_size(tensor.shape)
    with torch.no_grad():
        blocks = tensor.detach().reshape(-1, BLOCK).float()
        finite = blocks.isfinite()
        largest = torch.where(finite, blocks.abs(), 0).amax(dim=1, keepdim=True)
        # largest / 448 = mantissa 2^exponent with the mantissa in [1/2, 1), or 0 of zeros.
        mantissa, exponent = torch.frexp(largest / _LARGEST)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(min=_LEAST)
        scaled = torch.where(finite, blocks * _power_of_two(-exponent), math.nan)
        packed = torch.empty(size, dtype=torch.uint8, device=tensor.device)
        packed[: tensor.numel()] = scaled.to(_FORMAT).view(torch.uint8).flatten()
        packed[tensor.numel() :] = (exponent + _BIAS).to(torch.uint8).flatten()
    return packed


def unpack(packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What ``pack`` has rounded a tensor to.

    Args:
        packed: from ``pack``.
        shape, dtype: of the tensor. In bfloat16 and float32 every number is exact, but for one
            that was rounded up beyond the largest, which is infinite; float16 has less range.

    Raises:
        ValueError: as ``packed_size``, or another size of ``packed``.
    """
    if packed.shape != (packed_size(shape),):
        raise ValueError(f"{tuple(packed.shape)} bytes are not those of a message {tuple(shape)}")
    size = math.prod(shape)
    numbers = packed[:size].view(_FORMAT).view(-1, BLOCK).float()
    exponents = packed[size:].int().unsqueeze(1) - _BIAS
    return (numbers * _power_of_two(exponents)).to(dtype).view(*shape)


def _power_of_two(exponent: Tensor) -> Tensor:
    """float32, exact, of int32 exponents from -126 to 127."""
    return ((exponent + _BIAS) << 23).view(torch.float32)
