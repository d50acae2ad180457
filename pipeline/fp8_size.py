"""The size of a message in eight bits. No torch."""

import math
from collections.abc import Sequence

BLOCK = 128
"""Neighbouring numbers of the last dimension that share a scale."""


def packed_size(shape: Sequence[int]) -> int:
    """Bytes of a packed tensor: one per number, then one per block.

    Raises:
        ValueError: the last dimension is not whole blocks.
    """
    if not shape or shape[-1] % BLOCK:
        raise ValueError(
            f"a message of shape {tuple(shape)} is not made of blocks of {BLOCK} along its last "
            "dimension"
        )
    size = math.prod(shape)
    return size + size // BLOCK
