"""Launches of the kernels of fp8_messages.py."""

from functools import cache
from typing import Any

from torch import Tensor

from mhc_megatron.kernels.triton import fp8_messages
from mhc_megatron.kernels.triton.compiled import Launch

_NUMBERS = 4096  # of a program
_WARPS = 4


def pack(tensor: Tensor, packed: Tensor, block: int) -> None:
    """Fill ``packed`` [N + N / block] with the contiguous ``tensor``'s N numbers."""
    _run(fp8_messages.pack_blocks, tensor, packed, tensor.numel() // block, block)


def unpack(packed: Tensor, tensor: Tensor, block: int) -> None:
    """Fill the contiguous ``tensor``."""
    _run(fp8_messages.unpack_blocks, packed, tensor, tensor.numel() // block, block)


def _run(kernel: Any, source: Tensor, target: Tensor, blocks: int, block: int) -> None:
    if blocks:
        rows = max(_NUMBERS // block, 1)
        _bound(kernel, block, rows)((-(-blocks // rows),), (source, target), (blocks,))


@cache
def _bound(kernel: Any, block: int, rows: int) -> Launch:
    return Launch(kernel, num_warps=_WARPS, BLOCK=block, ROWS=rows)
