"""Calls that torch.compile, torch.export or FakeTensor trace: operators instead of functions.

Operators import triton, which a program without a GPU need not have.
"""

from torch import Tensor

from mhc_megatron.kernels import checks
from mhc_megatron.kernels.compositions import Gates
from mhc_megatron.kernels.options import MappingOptions
from mhc_megatron.kernels.packed import PackedMappings


def traced(streams: Tensor, tiles: object | None) -> bool:
    """Whether the operators run, which take no tiles."""
    traced = checks.is_traced(streams)
    if traced and tiles is not None:
        raise ValueError("tiles: expected None while tracing, which uses the default tiles")
    return traced


def post(streams: Tensor, branch: Tensor, branch_bias: Tensor | None, packed: Tensor) -> Tensor:
    """The next streams."""
    from mhc_megatron.kernels import operators

    return operators.post(streams, branch, branch_bias, packed)


def pre(
    streams: Tensor,
    weight: Tensor,
    alphas: Gates,
    bias: Tensor,
    options: MappingOptions,
    norm_weight: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, PackedMappings]:
    """The branch's input and the mappings."""
    from mhc_megatron.kernels import operators

    constants = operators.constants_of(options)
    u, packed, _, _, inverse_rms = operators.pre(
        streams, weight, *alphas, bias, norm_weight, *constants, norm_eps
    )
    inverse_rms = None if norm_weight is None else inverse_rms
    n, tokens = streams.shape[-2], streams.shape[:-2]
    return u, PackedMappings(packed, n, tokens, inverse_rms=inverse_rms)


def boundary(
    post_operands: tuple[Tensor, Tensor, Tensor | None, Tensor],
    pre_operands: tuple[Tensor | None, ...],
    options: MappingOptions,
    norm_eps: float,
    read_with_previous: bool,
) -> tuple[Tensor, Tensor, PackedMappings]:
    """The next streams, the branch's input and the mappings.

    Args:
        post_operands: streams, branch, branch_bias and packed mappings.
        pre_operands: weight, alphas, bias and norm_weight.
        options, norm_eps: as for ``post_pre``.
        read_with_previous: for ``single_pass``.
    """
    from mhc_megatron.kernels import operators

    constants = operators.constants_of(options)
    new_streams, u, new_packed, _, _, inverse_rms = operators.post_pre(
        *post_operands, *pre_operands, *constants, norm_eps, read_with_previous
    )
    has_norm = pre_operands[-1] is not None
    n, tokens = new_streams.shape[-2], new_streams.shape[:-2]
    mix = PackedMappings(new_packed, n, tokens, inverse_rms=inverse_rms if has_norm else None)
    return new_streams, u, mix
