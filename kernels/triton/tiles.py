"""Tile sizes: one frozen table, by number of streams, channels and dtype, that callers can override.

The choices decide speed, and through the order of sums the last bits, but no other property.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One kernel's tile: BT tokens by BC channels (powers of two), warps, and pipeline stages."""

    tokens: int
    channels: int
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """The tiles of one hyper-connection's kernels.

    Attributes:
        mix: ``mix_fwd``, post and the next pre in one pass; tokens at least 16.
        post: ``post_fwd``, post alone.
        mix_backward: ``mix_bwd``, the gradients of the coefficients.
        streams_backward: ``streams_bwd``, the gradients of streams and branch; tokens at least 16.
        weight_backward: ``weight_bwd``, the gradient of phi; ``channels`` counts columns of phi.
        weight_split: tokens per program of ``weight_bwd``, a multiple of its tile's.
    """

    mix: Tile
    post: Tile
    mix_backward: Tile
    streams_backward: Tile
    weight_backward: Tile
    weight_split: int


def default_tiles(num_streams: int, channels: int, dtype: torch.dtype) -> Tiles:
    """The table.

    Args:
        num_streams: n.
        channels: C.
        dtype: the streams'.
    """
    # A float32 tile holds twice the bytes; eight streams hold twice those of four.
    narrow = 2 if dtype == torch.float32 or num_streams > 4 else 1
    return Tiles(
        mix=Tile(tokens=32 // narrow, channels=64 // narrow),
        post=Tile(tokens=16, channels=128 // narrow, num_stages=1),
        mix_backward=Tile(tokens=16, channels=128 // narrow),
        streams_backward=Tile(tokens=16, channels=64 // narrow, num_stages=2),
        weight_backward=Tile(tokens=64 // narrow, channels=128 // narrow),
        # 320 programs at 4096 tokens of 4 x 2560 channels, on 132 multiprocessors.
        weight_split=1024,
    )
