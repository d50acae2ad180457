"""Launches: output buffers and arguments of each kernel of a plan; no autograd, no checks.

Of the forward and of a rebuild; backward_launch.py has the backward's.

Tensors are contiguous; of streams [..., n, C] and branch [..., C] only the sizes matter here.
Every line is paid at every launch, by a host that has less time than the GPU at small sizes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mhc_megatron.kernels.triton.arguments import Parameters, Shape
from mhc_megatron.kernels.triton.plan import Plan
from mhc_megatron.kernels.triton.recompute import rebuild_fwd
from mhc_megatron.kernels.triton.tape import Tape
from mhc_megatron.kernels.triton.tiles import Tile, blocks

# Sublayers that one launch of rebuild_fwd walks through: its code is unrolled over them. A longer
# block is cut, and the state read again at each cut.
REBUILT_TOGETHER = 8


def factor_weight(plan: Plan, stream: int | Tape | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """phi as the products with the streams take it, in the forward and in the backward.

    [PARTS, M, K], of many bfloat16 streams [K, 2 M]; of fewer the forward has chunks of it.
    """
    if plan.parts == 1:
        return weight, weight
    dtype, device = plan.factor_dtype, plan.device
    split = torch.empty(plan.shape_of_factors, dtype=dtype, device=device)
    if plan.wide:
        plan.split_weight(stream, weight, split)
        return split, split
    chunks = None
    if plan.chunk_width:
        chunks = torch.empty(plan.shape_of_chunks, dtype=dtype, device=device)
    plan.split_weight(stream, weight, split, chunks)
    return split if chunks is None else chunks, split


def post(
    plan: Plan,
    stream: int | Tape | None,
    streams: Tensor,
    branch: Tensor,
    bias: Tensor | None,
    packed: Tensor,
) -> Tensor:
    """The next streams."""
    new_streams = torch.empty_like(streams)
    if plan.num_tokens:
        plan.post_fwd(stream, streams, branch, bias, packed, new_streams, None, None)
    return new_streams


def mix(
    plan: Plan,
    stream: int | Tape | None,
    streams: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    packed: Tensor | None,
    factors: Tensor,
    parameters: Parameters,
    norm_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """``post_pre``, or ``pre`` without branch: streams, u, raw [M + 1, T], packed.

    ``factors``: of ``factor_weight``, the first. ``norm_weight``: u is normalised, and its 1/RMS
    [T] the last result.
    """
    num_tokens, dtype, device = plan.num_tokens, plan.dtype, plan.device
    if branch is None or packed is None:
        new_streams = streams
        u = torch.empty(plan.shape_of_input(streams), dtype=dtype, device=device)
        new_packed = torch.empty(plan.rows, num_tokens, dtype=torch.float32, device=device)
    else:
        # Of the same sizes, and the cheapest operation that allocates.
        new_streams, new_packed = torch.empty_like(streams), torch.empty_like(packed)
        u = torch.empty_like(branch, dtype=dtype)
    raw = torch.empty(plan.num_logits + 1, num_tokens, dtype=torch.float32, device=device)
    inverse_rms = None
    if norm_weight is not None:
        inverse_rms = torch.empty(num_tokens, dtype=torch.float32, device=device)
    if not num_tokens:
        return new_streams, u, raw, new_packed, inverse_rms
    _, *mappings = parameters
    results = u, raw, new_packed, norm_weight, inverse_rms
    operands = streams, branch, branch_bias, packed
    if plan.wide:
        if branch is None:
            plan.square_fwd(stream, streams, raw)
        else:
            plan.post_fwd(stream, *operands, new_streams, u if plan.single_pass else None, raw)
        sums = torch.empty(plan.project_sums, dtype=torch.float32, device=device)
        plan.project_fwd(stream, new_streams, factors, sums)
        plan.read_fwd(stream, new_streams, sums, *mappings, plan.matrices, *results)
    elif plan.mixes_on_hopper:
        # It copies 16 bytes at a time; what other modules make begins at a multiple of them.
        streams, branch = aligned(streams), None if branch is None else aligned(branch)
        y, read = streams if branch is None else new_streams, u if plan.single_pass else None
        sums = torch.empty(plan.mix_sums, dtype=torch.float32, device=device)
        operands = streams, branch, branch_bias, packed
        plan.hopper_mix_fwd(stream, *operands, factors, y, read, sums)
        plan.read_fwd(stream, y, sums, *mappings, plan.matrices, *results)
    else:
        plan.mix_fwd(stream, *operands, factors, *mappings, plan.matrices, new_streams, *results)
    return new_streams, u, raw, new_packed, inverse_rms


def aligned(tensor: Tensor) -> Tensor:
    """With an address that is a multiple of 16: itself or a copy."""
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def rebuild(
    streams: Tensor,
    branches: Sequence[Tensor],
    branch_biases: Sequence[Tensor | None],
    packed: Sequence[Tensor],
    new_streams: Sequence[Tensor],
    branch_inputs: Sequence[Tensor],
    *,
    norm_weights: Sequence[Tensor | None] | None = None,
    inverse_rms: Sequence[Tensor | None] | None = None,
    tile: Tile,
) -> None:
    """Fill ``new_streams`` and ``branch_inputs`` of a block; see ``kernels.rebuild``."""
    shape = Shape.of(streams)
    if not shape.num_tokens:
        return
    if norm_weights is None or inverse_rms is None:
        norm_weights = inverse_rms = [None] * len(packed)
    grid = (blocks(shape.num_tokens, tile.tokens), blocks(shape.channels, tile.channels))
    for first in range(0, len(packed), REBUILT_TOGETHER):
        cut = slice(first, first + REBUILT_TOGETHER)
        biases, weights = branch_biases[cut], norm_weights[cut]
        # Once per block, and with tuples of tensors: launched by Triton itself.
        rebuild_fwd[grid](
            streams if first == 0 else new_streams[first - 1],
            tuple(branches[cut]),
            tuple(biases),
            tuple(packed[cut]),
            tuple(new_streams[cut]),
            tuple(branch_inputs[cut]),
            tuple(weights),
            tuple(inverse_rms[cut]),
            shape.num_tokens,
            C=shape.channels,
            N=shape.num_streams,
            READS=len(packed[cut]),
            WRITES=len(branches[cut]),
            BIASES=_bits(biases),
            NORMS=_bits(weights),
            BT=tile.tokens,
            BC=tile.channels,
            num_warps=tile.num_warps,
        )


def _bits(given: Sequence[Tensor | None]) -> int:
    """A bit for each that is not None."""
    return sum(1 << index for index, tensor in enumerate(given) if tensor is not None)
