"""What the fused kernels compute, in terms of the reference: their definition.

Suffixes as in reference.py. All are differentiable by autograd.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from mhc_megatron.kernels.options import NORM_EPS, MappingOptions
from mhc_megatron.kernels.packed import PackedMappings
from mhc_megatron.kernels.precision import wide_dtype
from mhc_megatron.kernels.reference import (
    Mappings,
    mappings,
    post_mix,
    pre_mix,
    project,
    rms_norm,
)

Gates = tuple[Tensor, Tensor, Tensor | None]


def compute_mappings(
    streams: Tensor, weight: Tensor, alphas: Gates, bias: Tensor, *, options: MappingOptions
) -> Mappings:
    """``mappings`` of ``project``."""
    return mappings(
        project(streams, weight, eps=options.rms_eps),
        *alphas,
        bias,
        num_streams=streams.shape[-2],
        projection=options.projection,
        iterations=options.iterations,
        eps=options.eps,
    )


def pre(
    streams: Tensor,
    weight: Tensor,
    alphas: Gates,
    bias: Tensor,
    *,
    options: MappingOptions,
    norm_weight: Tensor | None = None,
    norm_eps: float = NORM_EPS,
) -> tuple[Tensor, Mappings]:
    """The branch's input and the mappings; see ``functional.pre``."""
    mix = compute_mappings(streams, weight, alphas, bias, options=options)
    return branch_input(streams, mix.pre, norm_weight, norm_eps), mix


def branch_input(
    streams: Tensor, pre: Tensor, norm_weight: Tensor | None, norm_eps: float
) -> Tensor:
    """``pre_mix``, and with a weight ``rms_norm`` of its rounded result."""
    mixed = pre_mix(streams, pre)
    return mixed if norm_weight is None else rms_norm(mixed, norm_weight, eps=norm_eps)


def post(
    streams: Tensor,
    branch: Tensor,
    mix: Mappings | PackedMappings,
    *,
    branch_bias: Tensor | None = None,
) -> Tensor:
    """The next streams; see ``functional.post``."""
    if branch_bias is not None:
        dtype = wide_dtype(branch, branch_bias)
        branch = branch.to(dtype) + branch_bias.to(dtype)
    return post_mix(streams, branch, mix.post, mix.res)


def post_pre(
    streams: Tensor,
    branch: Tensor,
    mix: Mappings | PackedMappings,
    weight: Tensor,
    alphas: Gates,
    bias: Tensor,
    *,
    options: MappingOptions,
    branch_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = NORM_EPS,
) -> tuple[Tensor, Tensor, Mappings]:
    """``post`` of one sublayer, then ``pre`` of the next; see ``functional.post_pre``."""
    streams = post(streams, branch, mix, branch_bias=branch_bias)
    # Read through an alias, the gradients of the streams are added as they are for post and pre
    # apart: first the two of pre, then the one of the next post. The same bits either way.
    read = streams.view_as(streams)
    u, new_mix = pre(
        read, weight, alphas, bias, options=options, norm_weight=norm_weight, norm_eps=norm_eps
    )
    return streams, u, new_mix


def single_pass(
    streams: Tensor,
    branch: Tensor,
    mix: Mappings | PackedMappings,
    weight: Tensor,
    alphas: Gates,
    bias: Tensor,
    *,
    options: MappingOptions,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Mappings]:
    """As ``post_pre``, but read with the previous H_pre; see ``functional.single_pass``."""
    streams = post(streams, branch, mix, branch_bias=branch_bias)
    # In this order the backward adds the reading's gradient last, as where the two are in
    # different pipeline stages: the same bits either way.
    branch_input = pre_mix(streams, mix.pre)
    return streams, branch_input, compute_mappings(streams, weight, alphas, bias, options=options)


def rebuild(
    streams: Tensor,
    branches: Sequence[Tensor],
    mixes: Sequence[Mappings | PackedMappings],
    *,
    branch_biases: Sequence[Tensor | None],
    norm_weights: Sequence[Tensor | None],
    norm_eps: float = NORM_EPS,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(streams, branch input) of each sublayer of a block, one at a time; see ``rebuild``."""
    for index, (mix, norm_weight) in enumerate(zip(mixes, norm_weights, strict=True)):
        if index:
            before = index - 1
            streams = post(
                streams, branches[before], mixes[before], branch_bias=branch_biases[before]
            )
        yield streams, branch_input(streams, mix.pre, norm_weight, norm_eps)
