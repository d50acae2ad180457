"""Tile sizes of the kernels that lead into the n streams and out of them.

As in tiles.py the choices decide speed and the last bits, no other property.
"""

from dataclasses import dataclass
from functools import cache

import torch

from mhc_megatron.kernels.triton.tiles import Tile


@dataclass(frozen=True, kw_only=True)
class HeadTiles:
    """The tiles of ``expand`` and the contractions.

    Attributes:
        copies: ``expand_fwd`` and ``contract_fwd``.
        learned: ``learned_fwd``.
        weights_backward: ``learned_weights_bwd``.
        streams_backward: ``learned_streams_bwd``; tokens at least 16.
        split: tokens per program of ``learned_streams_bwd``, a multiple of its tile's; each split
            costs n * n * C float32 numbers written and read.
    """

    copies: Tile
    learned: Tile
    weights_backward: Tile
    streams_backward: Tile
    split: int = 256


@cache
def default_head_tiles(num_streams: int, dtype: torch.dtype) -> HeadTiles:
    """The table.

    Args:
        num_streams: n.
        dtype: the streams'.
    """
    if dtype != torch.bfloat16:
        # float32 factors need more registers and shared memory.
        return HeadTiles(
            copies=Tile(tokens=16, channels=64),
            learned=Tile(tokens=16, channels=64, num_warps=8, num_stages=2),
            weights_backward=Tile(tokens=16, channels=64),
            streams_backward=Tile(tokens=16, channels=32, num_stages=2),
        )
    if num_streams > 4:
        return HeadTiles(
            copies=Tile(tokens=16, channels=128),
            learned=Tile(tokens=16, channels=64, num_warps=8, num_stages=2),
            weights_backward=Tile(tokens=16, channels=64),
            streams_backward=Tile(tokens=16, channels=64, num_stages=2),
        )
    return HeadTiles(
        copies=Tile(tokens=16, channels=128),
        learned=Tile(tokens=4, channels=128, num_warps=1),
        weights_backward=Tile(tokens=16, channels=128),
        streams_backward=Tile(tokens=16, channels=64),
        split=512,
    )
