"""Hyper-connections of a sublayer by the fastest implementation there is, or the one asked for.

``pre`` before a branch, ``post`` after it; ``post_pre`` is the two around the boundary between
sublayers, in one pass over the streams. compositions.py defines them. Every function takes
``backend``: "triton", "reference", or "auto", whose pick ``choose_backend`` explains.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mhc_megatron.kernels import checks, compositions
from mhc_megatron.kernels.backends import Backend, choose_backend
from mhc_megatron.kernels.compositions import Gates
from mhc_megatron.kernels.options import MappingOptions
from mhc_megatron.kernels.packed import PackedMappings, pack
from mhc_megatron.kernels.reference import Mappings

if TYPE_CHECKING:
    from mhc_megatron.kernels.triton.tiles import Tiles


def pre(
    streams: Tensor,
    weight: Tensor,
    alphas: Gates,
    bias: Tensor,
    *,
    options: MappingOptions,
    backend: Backend = "auto",
    tiles: "Tiles | None" = None,
) -> tuple[Tensor, Mappings | PackedMappings]:
    """The branch's input, ``sum_i H_pre[i] x[i]``, and the mappings of the sublayer.

    Args:
        streams: x, [..., n, C].
        weight: phi transposed, [M, n*C], rows packed pre | post | res; float32 for the kernels.
        alphas: alpha_pre, alpha_post, alpha_res, [1] each; the last None for ``identity``.
        bias: [M].
        options: projection, iterations and eps.
        backend: "auto", "triton" or "reference".
        tiles: of the kernels; None for the table of kernels/triton/tiles.py.

    Returns:
        u [..., C] in the streams' dtype; the float32 mappings, with ``pre``, ``post`` and ``res``.

    Raises:
        ValueError: an argument does not fit, or ``backend="triton"`` cannot run.
    """
    checks.check_streams(streams)
    checks.check_parameters(streams, weight, alphas, bias, options)
    if choose_backend(streams, options=options, backend=backend).name == "reference":
        return compositions.pre(streams, weight, alphas, bias, options=options)
    _check_parameters_of_kernels(weight, alphas, bias)
    if _traced(streams, tiles):
        from mhc_megatron.kernels import operators

        constants = operators.constants_of(options)
        u, packed, *_ = operators.pre(streams, weight, *alphas, bias, *constants)
        return u, PackedMappings(packed, streams.shape[-2], streams.shape[:-2])
    from mhc_megatron.kernels.functions import Pre

    u, packed, through = Pre.apply(
        streams, weight, *alphas, bias, options, tiles or _tiles(streams)
    )
    return u, PackedMappings(packed, streams.shape[-2], streams.shape[:-2], streams, through)


def post(
    streams: Tensor,
    branch: Tensor,
    mix: Mappings | PackedMappings,
    *,
    branch_bias: Tensor | None = None,
    backend: Backend = "auto",
    tiles: "Tiles | None" = None,
) -> Tensor:
    """The next streams, ``x'[o] = sum_i H_res[o, i] x[i] + H_post[o] f``.

    Args:
        streams: x, [..., n, C], what ``pre`` read.
        branch: [..., C]; f is the branch's output plus ``branch_bias``.
        mix: what ``pre`` returned.
        branch_bias: [C] or None; added in float32.
        backend, tiles: as for ``pre``.

    Returns:
        [..., n, C] in the streams' dtype.

    Raises:
        ValueError: as ``pre``.
    """
    checks.check_streams(streams)
    checks.check_branch(streams, branch, branch_bias)
    checks.check_mix(streams, mix)
    if choose_backend(streams, backend=backend).name == "reference":
        return compositions.post(streams, branch, mix, branch_bias=branch_bias)
    packed = pack(mix)
    checks.check_kernel_operands(branch=branch, branch_bias=branch_bias, mix=packed)
    if _traced(streams, tiles):
        from mhc_megatron.kernels import operators

        return operators.post(streams, branch, branch_bias, packed)
    from mhc_megatron.kernels.functions import Post

    if isinstance(mix, PackedMappings):
        streams = mix.streams_for_post(streams)
    return Post.apply(streams, branch, branch_bias, packed, tiles or _tiles(streams))


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
    backend: Backend = "auto",
    tiles: "Tiles | None" = None,
) -> tuple[Tensor, Tensor, Mappings | PackedMappings]:
    """``post`` of one sublayer and ``pre`` of the next.

    Args:
        streams, branch, mix, branch_bias: of the sublayer that ends, as for ``post``.
        weight, alphas, bias, options: of the next sublayer, as for ``pre``.
        backend, tiles: as for ``pre``.

    Returns:
        The next streams [..., n, C], the next branch's input [..., C], and its mappings.

    Raises:
        ValueError: as ``pre``.
    """
    return _boundary(
        streams, branch, mix, weight, alphas, bias, options, branch_bias, False, backend, tiles
    )


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
    backend: Backend = "auto",
    tiles: "Tiles | None" = None,
) -> tuple[Tensor, Tensor, Mappings | PackedMappings]:
    """As ``post_pre``, but the next branch reads with ``mix.pre``, the previous sublayer's H_pre.

    DeepSeek-V4.1's single-pass mHC. The new mappings' H_pre is for the sublayer after the next.

    Args, returns and raises: as for ``post_pre``.
    """
    return _boundary(
        streams, branch, mix, weight, alphas, bias, options, branch_bias, True, backend, tiles
    )


def _boundary(
    streams: Tensor,
    branch: Tensor,
    mix: Mappings | PackedMappings,
    weight: Tensor,
    alphas: Gates,
    bias: Tensor,
    options: MappingOptions,
    branch_bias: Tensor | None,
    read_with_previous: bool,
    backend: Backend,
    tiles: "Tiles | None",
) -> tuple[Tensor, Tensor, Mappings | PackedMappings]:
    """``post_pre``, or ``single_pass`` with ``read_with_previous``."""
    checks.check_streams(streams)
    checks.check_branch(streams, branch, branch_bias)
    checks.check_mix(streams, mix)
    checks.check_parameters(streams, weight, alphas, bias, options)
    if choose_backend(streams, options=options, backend=backend).name == "reference":
        compose = compositions.single_pass if read_with_previous else compositions.post_pre
        return compose(
            streams, branch, mix, weight, alphas, bias, options=options, branch_bias=branch_bias
        )
    packed = pack(mix)
    _check_parameters_of_kernels(weight, alphas, bias)
    checks.check_kernel_operands(branch=branch, branch_bias=branch_bias, mix=packed)
    if _traced(streams, tiles):
        from mhc_megatron.kernels import operators

        operands = (streams, branch, branch_bias, packed, weight, *alphas, bias)
        constants = operators.constants_of(options)
        new_streams, u, new_packed, *_ = operators.post_pre(
            *operands, *constants, read_with_previous
        )
        return new_streams, u, PackedMappings(new_packed, streams.shape[-2], streams.shape[:-2])
    from mhc_megatron.kernels.functions import PostPre

    if isinstance(mix, PackedMappings):
        streams = mix.streams_for_post(streams)

    new_streams, u, new_packed = PostPre.apply(
        streams,
        branch,
        branch_bias,
        packed,
        weight,
        *alphas,
        bias,
        options,
        read_with_previous,
        tiles or _tiles(streams),
    )
    return new_streams, u, PackedMappings(new_packed, streams.shape[-2], streams.shape[:-2])


def _traced(streams: Tensor, tiles: "Tiles | None") -> bool:
    """Whether torch.compile, torch.export or FakeTensor asks what would be computed."""
    traced = torch.compiler.is_compiling() or isinstance(streams, FakeTensor)
    if traced and tiles is not None:
        raise ValueError("tiles: expected None while tracing, which uses the default tiles")
    return traced


def _check_parameters_of_kernels(weight: Tensor, alphas: Gates, bias: Tensor) -> None:
    checks.check_kernel_operands(
        weight=weight, bias=bias, alpha_pre=alphas[0], alpha_post=alphas[1], alpha_res=alphas[2]
    )


def _tiles(streams: Tensor) -> "Tiles":
    from mhc_megatron.kernels.triton.tiles import default_tiles

    return default_tiles(streams.shape[-2], streams.shape[-1], streams.dtype)
