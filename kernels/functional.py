"""Hyper-connections of a sublayer by the fastest implementation there is, or the one asked for.

``pre`` before a branch, ``post`` after it; ``post_pre`` is the two around the boundary between
sublayers, in one pass over the streams. compositions.py defines them. Every function takes
``backend``: "triton", "native", "reference", or "auto", whose pick ``choose_backend`` explains.
"""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor

from mhc_megatron.kernels import checks, compositions, tracing
from mhc_megatron.kernels.backends import Backend, choose_backend
from mhc_megatron.kernels.compositions import Gates
from mhc_megatron.kernels.known import Known, signature_of
from mhc_megatron.kernels.main_grad import add_gradient_to
from mhc_megatron.kernels.options import MappingOptions
from mhc_megatron.kernels.packed import PackedMappings, pack
from mhc_megatron.kernels.reference import Mappings

if TYPE_CHECKING:
    from mhc_megatron.kernels.triton.plan import Plan
    from mhc_megatron.kernels.triton.tiles import Tiles

# Of calls that the kernels take: such a call is checked once.
_pre_plans: "Known[Plan]" = Known()
_post_plans: "Known[Plan]" = Known()
_boundary_plans: "Known[Plan]" = Known()


def pre(
    streams: Tensor,
    weight: Tensor,
    alphas: Gates,
    bias: Tensor,
    *,
    options: MappingOptions,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
    main_grad: Tensor | None = None,
    num_streams: int | None = None,
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
        norm_weight: [C], of the branch's own RMSNorm, which is then applied to what is returned;
            any floating dtype.
        norm_eps: of that norm, inside the root; None for 1e-5.
        main_grad: [M, n*C] float32: backward adds phi's gradient to it and returns none for
            ``weight``, as Megatron's ``gradient_accumulation_fusion`` does. The sum is the same.
        num_streams: n of streams that are given as [..., n*C], in the same memory; None for
            [..., n, C].
        backend: "auto", "triton", "native" (the same kernels, launched by the extension, which
            raises where it is not built) or "reference".
        tiles: of the kernels; None for the table of kernels/triton/tiles.py.

    Returns:
        u [..., C] in the streams' dtype, normalised with ``norm_weight``; the float32 mappings,
        with ``pre``, ``post`` and ``res``.

    Raises:
        ValueError: an argument does not fit, or ``backend="triton"`` cannot run.
    """
    given = (streams, weight, *alphas, bias, norm_weight, main_grad)
    others = norm_eps, num_streams, backend, tiles, weight.requires_grad
    signature = signature_of(given, options, *others)
    plan = _pre_plans.get(signature)
    if plan is None:
        x = checks.check_streams(streams, num_streams)
        checks.check_parameters(x, weight, alphas, bias, options)
        checks.check_main_grad(x, weight, main_grad)
        eps = checks.check_norm(x, norm_weight, norm_eps)
        if choose_backend(x, options=options, backend=backend).name == "reference":
            weight = add_gradient_to(weight, main_grad)
            return compositions.pre(
                x,
                weight,
                alphas,
                bias,
                options=options,
                norm_weight=norm_weight,
                norm_eps=eps,
            )
        _check_operands_of_kernels(weight, alphas, bias, norm_weight)
        if tracing.traced(x, tiles):
            return tracing.pre(x, weight, alphas, bias, options, norm_weight, eps)
        plan = _module("triton.plan").plan_of(
            x,
            norm_weight=norm_weight,
            options=options,
            tiles=tiles,
            accumulates=_accumulates(weight, main_grad),
            norm_eps=eps,
            flat=num_streams is not None,
        )
        _pre_plans.remember(signature, plan)
    u, packed, through, inverse_rms = _module("functions").pre(
        plan,
        main_grad if plan.accumulates else None,
        streams,
        weight,
        *alphas,
        bias,
        norm_weight,
    )
    return u, PackedMappings(packed, plan.num_streams, u.shape[:-1], streams, through, inverse_rms)


def post(
    streams: Tensor,
    branch: Tensor,
    mix: Mappings | PackedMappings,
    *,
    branch_bias: Tensor | None = None,
    num_streams: int | None = None,
    backend: Backend = "auto",
    tiles: "Tiles | None" = None,
) -> Tensor:
    """The next streams, ``x'[o] = sum_i H_res[o, i] x[i] + H_post[o] f``.

    Args:
        streams: x, [..., n, C], what ``pre`` read.
        branch: [..., C]; f is the branch's output plus ``branch_bias``.
        mix: what ``pre`` returned.
        branch_bias: [C] or None; added in float32.
        num_streams, backend, tiles: as for ``pre``.

    Returns:
        [..., n, C] in the streams' dtype; [..., n*C] with ``num_streams``.

    Raises:
        ValueError: as ``pre``.
    """
    signature = plan = None
    if isinstance(mix, PackedMappings):
        packed, sizes = mix.packed, (mix.num_streams, mix.tokens)
        given = (streams, branch, branch_bias, packed)
        signature = signature_of(given, None, *sizes, num_streams, backend, tiles)
        plan = _post_plans.get(signature)
    if plan is None:
        x = checks.check_streams(streams, num_streams)
        checks.check_branch(x, branch, branch_bias)
        checks.check_mix(x, mix)
        if choose_backend(x, backend=backend).name == "reference":
            next_streams = compositions.post(x, branch, mix, branch_bias=branch_bias)
            return _shaped(next_streams, num_streams)
        packed = pack(mix)
        checks.check_kernel_operands(branch=branch, branch_bias=branch_bias, mix=packed)
        if tracing.traced(x, tiles):
            return _shaped(tracing.post(x, branch, branch_bias, packed), num_streams)
        plan = _module("triton.plan").plan_of(x, branch, branch_bias, tiles=tiles)
        _post_plans.remember(signature, plan)
    if isinstance(mix, PackedMappings):
        streams = mix.streams_for_post(streams)
    return _module("functions").post(plan, streams, branch, branch_bias, packed)


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
    norm_eps: float | None = None,
    main_grad: Tensor | None = None,
    num_streams: int | None = None,
    backend: Backend = "auto",
    tiles: "Tiles | None" = None,
) -> tuple[Tensor, Tensor, Mappings | PackedMappings]:
    """``post`` of one sublayer and ``pre`` of the next.

    Args:
        streams, branch, mix, branch_bias: of the sublayer that ends, as for ``post``.
        weight, alphas, bias, options, norm_weight, norm_eps, main_grad: of the next sublayer, as
            for ``pre``.
        num_streams, backend, tiles: as for ``pre``.

    Returns:
        The next streams, in the shape of these, the next branch's input [..., C], normalised with
        ``norm_weight``, and its mappings.

    Raises:
        ValueError: as ``pre``.
    """
    return _boundary(
        streams,
        branch,
        mix,
        weight,
        alphas,
        bias,
        options,
        branch_bias,
        norm_weight,
        norm_eps,
        main_grad,
        False,
        num_streams,
        backend,
        tiles,
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
    main_grad: Tensor | None = None,
    num_streams: int | None = None,
    backend: Backend = "auto",
    tiles: "Tiles | None" = None,
) -> tuple[Tensor, Tensor, Mappings | PackedMappings]:
    """As ``post_pre``, but the next branch reads with ``mix.pre``, the previous sublayer's H_pre.

    DeepSeek-V4.1's single-pass mHC. The new mappings' H_pre is for the sublayer after the next.

    Args, returns and raises: as for ``post_pre``, but the branch's norm stays with the branch.
    """
    return _boundary(
        streams,
        branch,
        mix,
        weight,
        alphas,
        bias,
        options,
        branch_bias,
        None,
        None,
        main_grad,
        True,
        num_streams,
        backend,
        tiles,
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
    norm_weight: Tensor | None,
    norm_eps: float | None,
    main_grad: Tensor | None,
    read_with_previous: bool,
    num_streams: int | None,
    backend: Backend,
    tiles: "Tiles | None",
) -> tuple[Tensor, Tensor, Mappings | PackedMappings]:
    """``post_pre``, or ``single_pass`` with ``read_with_previous``."""
    signature = plan = None
    if isinstance(mix, PackedMappings):
        packed = mix.packed
        given = (
            streams,
            branch,
            packed,
            weight,
            *alphas,
            bias,
            branch_bias,
            norm_weight,
            main_grad,
        )
        signature = signature_of(
            given,
            options,
            mix.num_streams,
            mix.tokens,
            norm_eps,
            read_with_previous,
            num_streams,
            backend,
            tiles,
            weight.requires_grad,
        )
        plan = _boundary_plans.get(signature)
    if plan is None:
        x = checks.check_streams(streams, num_streams)
        checks.check_branch(x, branch, branch_bias)
        checks.check_mix(x, mix)
        checks.check_parameters(x, weight, alphas, bias, options)
        checks.check_main_grad(x, weight, main_grad)
        eps = checks.check_norm(x, norm_weight, norm_eps)
        if choose_backend(x, options=options, backend=backend).name == "reference":
            operands = (x, branch, mix, add_gradient_to(weight, main_grad), alphas, bias)
            if read_with_previous:
                next_streams, u, made = compositions.single_pass(
                    *operands, options=options, branch_bias=branch_bias
                )
            else:
                next_streams, u, made = compositions.post_pre(
                    *operands,
                    options=options,
                    branch_bias=branch_bias,
                    norm_weight=norm_weight,
                    norm_eps=eps,
                )
            return _shaped(next_streams, num_streams), u, made
        packed = pack(mix)
        _check_operands_of_kernels(
            weight, alphas, bias, norm_weight, branch=branch, branch_bias=branch_bias, mix=packed
        )
        if tracing.traced(x, tiles):
            post_operands = (x, branch, branch_bias, packed)
            pre_operands = (weight, *alphas, bias, norm_weight)
            next_streams, u, packed_mix = tracing.boundary(
                post_operands, pre_operands, options, eps, read_with_previous
            )
            return _shaped(next_streams, num_streams), u, packed_mix
        plan = _module("triton.plan").plan_of(
            x,
            branch,
            branch_bias,
            norm_weight,
            options=options,
            tiles=tiles,
            single_pass=read_with_previous,
            accumulates=_accumulates(weight, main_grad),
            norm_eps=eps,
            flat=num_streams is not None,
        )
        _boundary_plans.remember(signature, plan)
    if isinstance(mix, PackedMappings):
        streams = mix.streams_for_post(streams)
    new_streams, u, new_packed, inverse_rms = _module("functions").post_pre(
        plan,
        main_grad if plan.accumulates else None,
        streams,
        branch,
        branch_bias,
        packed,
        weight,
        *alphas,
        bias,
        norm_weight,
    )
    mappings = PackedMappings(new_packed, plan.num_streams, u.shape[:-1], None, None, inverse_rms)
    return new_streams, u, mappings


def _shaped(streams: Tensor, num_streams: int | None) -> Tensor:
    """[..., n, C], or as [..., n*C] where they were given so."""
    return streams if num_streams is None else streams.flatten(-2)


def _accumulates(weight: Tensor, main_grad: Tensor | None) -> bool:
    """Whether phi's gradient is wanted, and added to a buffer."""
    return main_grad is not None and weight.requires_grad


def _check_operands_of_kernels(
    weight: Tensor, alphas: Gates, bias: Tensor, norm_weight: Tensor | None, **others: Tensor | None
) -> None:
    checks.check_kernel_operands(
        weight=weight,
        bias=bias,
        alpha_pre=alphas[0],
        alpha_post=alphas[1],
        alpha_res=alphas[2],
        norm_weight=norm_weight,
        **others,
    )


# Of modules that import triton, which a program without a GPU need not have; an import statement
# costs as much at every call as all of a tensor's checks.
@cache
def _module(name: str) -> ModuleType:
    return import_module(f"mhc_megatron.kernels.{name}")
