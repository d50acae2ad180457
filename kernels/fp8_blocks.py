"""Tensors in eight bits: float8 numbers in blocks, each with a power of two as its scale.

Both activations and gradients are e4m3. The scale of a block takes care of the range, so that the
third bit of mantissa is worth more than e5m2's exponents (DeepSeek-V3, arXiv 2412.19437, section
3.3.2). Powers of two make scaling exact: the only rounding is the one to e4m3.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mhc_megatron.kernels.backends import Backend, choose_backend

_FORMAT = torch.float8_e4m3fn
_LARGEST = 448.0  # of e4m3
_BIAS = 127  # a byte per scale is its exponent plus this: E8M0 of the OCP microscaling formats
_LEAST = -126  # the exponent of the least normal float32


def pack(tensor: Tensor, *, block: int, backend: Backend = "auto") -> Tensor:
    """Round to blocks of e4m3.

    A scale is the least power of two by which no number of its block exceeds what e4m3 can hold. A
    number that is not finite becomes NaN. Not differentiable. Both backends give the same bytes.

    Args:
        tensor: float32, bfloat16 or float16; the last dimension is whole blocks.
        block: neighbouring numbers that share a scale; for Triton a power of two.
        backend: as for ``pre``.

    Returns:
        uint8: the numbers in the tensor's order, then the exponents plus 127.

    Raises:
        ValueError: the last dimension is not whole blocks, or ``backend="triton"`` cannot run.
    """
    _check(tensor.shape, block)
    tensor = tensor.detach().contiguous()
    packed = torch.empty(
        tensor.numel() + tensor.numel() // block, dtype=torch.uint8, device=tensor.device
    )
    if choose_backend(tensor, num_streams=1, backend=backend).name == "triton":
        from mhc_megatron.kernels.triton import fp8_launch

        fp8_launch.pack(tensor, packed, block)
    else:
        _pack(tensor, packed, block)
    return packed


def unpack(
    packed: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    block: int,
    backend: Backend = "auto",
) -> Tensor:
    """What ``pack`` has rounded a tensor to.

    Args:
        packed: from ``pack``.
        shape, dtype: of the tensor. In bfloat16 and float32 every number is exact, but for one
            that was rounded up beyond the largest, which is infinite; float16 has less range.
        block, backend: as for ``pack``.

    Raises:
        ValueError: as ``pack``, or another size of ``packed``.
    """
    _check(shape, block)
    size = math.prod(shape)
    if packed.shape != (size + size // block,):
        raise ValueError(f"{tuple(packed.shape)} bytes are not those of a message {tuple(shape)}")
    tensor = torch.empty(*shape, dtype=dtype, device=packed.device)
    if choose_backend(tensor, num_streams=1, backend=backend).name == "triton":
        from mhc_megatron.kernels.triton import fp8_launch

        fp8_launch.unpack(packed.contiguous(), tensor, block)
    else:
        numbers = packed[:size].view(_FORMAT).view(-1, block).float()
        exponents = packed[size:].int().unsqueeze(1) - _BIAS
        tensor.view(-1, block).copy_(numbers * _power_of_two(exponents))
    return tensor


def _check(shape: Sequence[int], block: int) -> None:
    if not shape or shape[-1] % block:
        raise ValueError(
            f"a message of shape {tuple(shape)} is not made of blocks of {block} along its last "
            "dimension"
        )


def _pack(tensor: Tensor, packed: Tensor, block: int) -> None:
    blocks = tensor.view(-1, block).float()
    finite = blocks.isfinite()
    largest = torch.where(finite, blocks.abs(), 0).amax(dim=1, keepdim=True)
    # Its mantissa is in [1/2, 1), and so is that of 448. Nothing is divided: GPUs round that of the
    # least numbers otherwise.
    limit, shift = math.frexp(_LARGEST)
    mantissa, exponent = torch.frexp(largest)
    exponent = exponent - shift + (mantissa > limit).int()
    exponent = torch.where(largest > 0, exponent, _LEAST).clamp(min=_LEAST)
    scaled = torch.where(finite, blocks * _power_of_two(-exponent), math.nan)
    packed[: tensor.numel()] = scaled.to(_FORMAT).view(torch.uint8).flatten()
    packed[tensor.numel() :] = (exponent + _BIAS).to(torch.uint8).flatten()


def _power_of_two(exponent: Tensor) -> Tensor:
    """float32, exact, of int32 exponents from -126 to 127."""
    return ((exponent + _BIAS) << 23).view(torch.float32)
