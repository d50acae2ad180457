"""What launches share: parameters, sizes, and constants that follow from the dtype."""

from functools import cache
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor

from mhc_megatron.kernels.options import MappingOptions
from mhc_megatron.kernels.triton.tile_math import INTERPRETED as _INTERPRETED
from mhc_megatron.kernels.triton.tiles import Tile

# For the host, what is a constant of the kernels.
INTERPRETED = bool(_INTERPRETED)


class Parameters(NamedTuple):
    """Of one hyper-connection, all float32: weight [M, K], alphas [1], bias [M]."""

    weight: Tensor
    alpha_pre: Tensor
    alpha_post: Tensor
    alpha_res: Tensor | None
    bias: Tensor


class Shape(NamedTuple):
    """Sizes that all kernels share."""

    num_tokens: int
    num_streams: int
    channels: int

    @classmethod
    def of(cls, streams: Tensor) -> "Shape":
        shape = streams.shape
        n, channels = shape[-2], shape[-1]
        return cls(streams.numel() // (n * channels), n, channels)


def parts_of(dtype: torch.dtype) -> int:
    """How many bfloat16 parts stand for a float32 factor; 1 is the float32 itself."""
    return 2 if dtype == torch.bfloat16 else 1


def precision_of(dtype: torch.dtype) -> str:
    """How tensor cores multiply: float16 is exact in tf32, and three products restore phi."""
    return {torch.bfloat16: "ieee", torch.float16: "tf32x3", torch.float32: "ieee"}[dtype]


def vector_of(dtype: torch.dtype, tile: Tile) -> int:
    """Neighbouring channels of a tile that one thread holds: what a 16-byte load brings."""
    return min(16 // dtype.itemsize, tile.tokens * tile.channels // (32 * tile.num_warps))


def padded(number: int, least: int) -> int:
    """The next power of two."""
    return max(least, 1 << (number - 1).bit_length())


def logit_rows(num_logits: int, dtype: torch.dtype) -> int:
    """M padded so that all parts together fill the 64 rows of a Hopper tensor core's product."""
    return padded(num_logits, 32 if parts_of(dtype) == 2 else 16)


def logit_groups(num_logits: int) -> tuple[int, int]:
    """M as two powers of two, or as one and 0: 80 rows are 64 and 16, where one would be 128."""
    head = 1 << (num_logits.bit_length() - 1)
    tail = padded(num_logits - head, 16) if num_logits > head else 0
    whole = padded(num_logits, 16)
    return (head, tail) if tail and head + tail < whole else (whole, 0)


@cache
def permutation_matrices(num_streams: int, device: torch.device) -> Tensor:
    """[n!, n, n] float32: ``P_k[o, order_k[o]] = 1``, in the order of ``permutation``."""
    orders = torch.tensor(list(permutations(range(num_streams))))
    return torch.nn.functional.one_hot(orders, num_streams).float().contiguous().to(device)


def matrices_of(options: MappingOptions, num_streams: int, device: torch.device) -> Tensor | None:
    if options.projection != "permutation":
        return None
    return permutation_matrices(num_streams, device)
