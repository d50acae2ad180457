"""The states that hyper-connections dropped after the forward, from what they kept."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mhc_megatron.kernels import checks, compositions
from mhc_megatron.kernels.backends import Backend, choose_backend
from mhc_megatron.kernels.options import NORM_EPS
from mhc_megatron.kernels.packed import PackedMappings, pack
from mhc_megatron.kernels.reference import Mappings

if TYPE_CHECKING:
    from mhc_megatron.kernels.triton.tiles import Tiles


class Rebuilt(NamedTuple):
    """What the sublayers of a block read.

    Attributes:
        streams: of every sublayer but the first, [..., n, C] each.
        branch_inputs: of every sublayer, [..., C] each, before its norm or as ``pre`` with
            ``norm_weight`` gives them; the streams' dtype.
    """

    streams: list[Tensor]
    branch_inputs: list[Tensor]


@torch.no_grad()
def rebuild(
    streams: Tensor,
    branches: Sequence[Tensor],
    mixes: Sequence[Mappings | PackedMappings],
    *,
    branch_biases: Sequence[Tensor | None] | None = None,
    norm_weights: Sequence[Tensor | None] | None = None,
    norm_eps: float | None = None,
    out: Rebuilt | None = None,
    backend: Backend = "auto",
    tiles: "Tiles | None" = None,
) -> Rebuilt:
    """The streams and branch inputs of consecutive sublayers, without running a branch.

    mHC, arXiv 2512.24880, section 4.3.2. The same bits as ``pre`` and ``post`` or ``post_pre``
    gave, if ``backend`` and the operands are those of the forward. Not differentiable.

    Args:
        streams: x of the first sublayer, [..., n, C].
        branches: outputs of all branches but the last, [..., C] each.
        mixes: of all sublayers, what ``pre`` or ``post_pre`` returned.
        branch_biases: [C] or None for each of ``branches``; None for no bias at all.
        norm_weights: [C] for each branch input that ``pre`` or ``post_pre`` normalised, None for
            each that it did not; None if there is none.
        norm_eps: as in the forward.
        out: contiguous memory for the result, of the right shapes; None allocates it.
        backend: as for ``pre``.
        tiles: of the kernel; None for the table of kernels/triton/tiles.py.

    Returns:
        L - 1 streams and L branch inputs of L sublayers; ``out`` if it was given.

    Raises:
        ValueError: an argument does not fit, or ``backend="triton"`` cannot run.
    """
    biases = [None] * len(branches) if branch_biases is None else list(branch_biases)
    checks.check_streams(streams)
    weights = [None] * len(mixes) if norm_weights is None else list(norm_weights)
    _check_counts(
        len(mixes),
        branches=len(branches) + 1,
        branch_biases=len(biases) + 1,
        norm_weights=len(weights),
    )
    if norm_eps is not None and not any(weight is not None for weight in weights):
        raise ValueError(f"norm_eps: expected None without norm_weights, got {norm_eps}")
    eps = NORM_EPS if norm_eps is None else norm_eps
    for weight in weights:
        if weight is not None:
            checks.check_norm(streams, weight, eps)
    for branch, bias in zip(branches, biases, strict=True):
        checks.check_branch(streams, branch, bias)
    for mix in mixes:
        checks.check_mix(streams, mix)
    if out is None:
        out = Rebuilt(
            [torch.empty_like(streams) for _ in branches],
            [streams.new_empty((*streams.shape[:-2], streams.shape[-1])) for _ in mixes],
        )
    else:
        _check_counts(
            len(mixes), streams=len(out.streams) + 1, branch_inputs=len(out.branch_inputs)
        )
        checks.check_rebuilt(streams, out.streams, out.branch_inputs)
    if choose_backend(streams, backend=backend).name == "reference":
        states = compositions.rebuild(
            streams,
            branches,
            mixes,
            branch_biases=biases,
            norm_weights=weights,
            norm_eps=eps,
        )
        for (state, branch_input), index in zip(states, range(len(mixes)), strict=True):
            if index:
                out.streams[index - 1].copy_(state)
            out.branch_inputs[index].copy_(branch_input)
        return out
    packed = [pack(mix) for mix in mixes]
    for branch, bias in zip(branches, biases, strict=True):
        checks.check_kernel_operands(branch=branch, branch_bias=bias)
    for rows in packed:
        checks.check_kernel_operands(mix=rows)
    inverse_rms = [
        None if weight is None else _inverse_rms(mix)
        for weight, mix in zip(weights, mixes, strict=True)
    ]
    for weight in weights:
        checks.check_kernel_operands(norm_weight=weight)
    from mhc_megatron.kernels.triton import launch
    from mhc_megatron.kernels.triton.arguments import Shape
    from mhc_megatron.kernels.triton.tiles import default_tiles

    num_tokens, n, channels = Shape.of(streams)
    tiles = tiles or default_tiles(n, num_tokens, channels, streams.dtype)
    launch.rebuild(
        streams,
        branches,
        biases,
        packed,
        *out,
        norm_weights=weights,
        inverse_rms=inverse_rms,
        tile=tiles.rebuild,
    )
    return out


def _inverse_rms(mix: Mappings | PackedMappings) -> Tensor:
    """Of a sublayer whose input was normalised; summed again, its last bits might differ."""
    if isinstance(mix, PackedMappings) and mix.inverse_rms is not None:
        return mix.inverse_rms
    raise ValueError(
        "norm_weights: expected None for mixes that pre and post_pre returned without a "
        "norm_weight, or from another backend"
    )


def _check_counts(sublayers: int, **given: int) -> None:
    """Every count in ``given`` is that of the mixes."""
    if sublayers < 1:
        raise ValueError("mixes: expected one for each sublayer of the block, got none")
    for name, count in given.items():
        if count != sublayers:
            raise ValueError(f"{name}: they are of {count} sublayers, the mixes of {sublayers}")
