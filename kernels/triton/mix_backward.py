"""Backward, first pass: from the gradients of u and of the mappings to those of the raw logits.

What H_pre's gradient is made of comes from memory, that of the others from iterations whose steps
wait for each other. They are programs of their own, which share the multiprocessors.
"""

import triton
import triton.language as tl

from mhc_megatron.kernels.triton.coefficients import load_block
from mhc_megatron.kernels.triton.logits_backward import matrix_bwd, permutation_bwd, vector_bwd
from mhc_megatron.kernels.triton.norm import (
    load_norm_weight,
    normalise_bwd,
    store_norm_partial,
)
from mhc_megatron.kernels.triton.tile_math import (
    channel_mask,
    lane_sums,
    load_coefficients,
    load_streams,
    pre_mix,
    widened,
    zero_sums,
)


@triton.jit
def mix_bwd(
    y_ptr,
    grad_u_ptr,
    grad_packed_ptr,
    raw_ptr,
    alpha_pre_ptr,
    alpha_post_ptr,
    alpha_res_ptr,
    bias_ptr,
    matrices_ptr,
    projected_ptr,
    radial_ptr,
    partial_ptr,
    history_ptr,
    packed_ptr,
    norm_weight_ptr,
    norm_inverse_rms_ptr,
    norm_grad_u_ptr,
    norm_partial_ptr,
    T,
    eps,
    C: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    NN: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    PROJECTION: tl.constexpr,
    ITERATIONS: tl.constexpr,
    SINGLE_PASS: tl.constexpr,
    HAS_GRAD_PACKED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    COUNT: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of ``vec(y) phi`` ([PARTS * M, T]), of the RMS, and parts of bias and alpha.

    The first programs have COUNT tokens each and the logits of H_post and H_res, the others BT
    tokens and those of H_pre. SINGLE_PASS has only the first, for all logits.

    ``radial``: [2, T], c in ``grad y += c y``, what the division by the RMS contributes: of the
    first programs, and of the others.
    ``partial``: [2 M, columns], sums over a program's tokens of the logits' gradients and of their
    products with the raw logits; a column is a program of its group. ``history``: scratch of
    ``sinkhorn_fwd``.
    HAS_NORM: ``grad_u`` is the gradient of the normalised u. u's own is written to
    ``norm_grad_u``, and parts of the norm's weight to ``norm_partial``, [programs, C].
    """
    T = tl.cast(T, tl.int64)
    program = tl.program_id(0)
    programs = tl.cast(tl.cdiv(T, COUNT), tl.int32)
    columns = programs if SINGLE_PASS else tl.cast(tl.cdiv(T, BT), tl.int32)
    if program < programs:
        later_bwd(
            program.to(tl.int64) * COUNT + tl.arange(0, COUNT),
            grad_packed_ptr,
            raw_ptr,
            alpha_pre_ptr,
            alpha_post_ptr,
            alpha_res_ptr,
            bias_ptr,
            matrices_ptr,
            projected_ptr,
            radial_ptr,
            partial_ptr + program,
            columns,
            history_ptr,
            T,
            eps,
            C,
            N,
            NP,
            NN,
            M,
            PARTS,
            PROJECTION,
            ITERATIONS,
            SINGLE_PASS,
            HAS_GRAD_PACKED,
        )
    elif not SINGLE_PASS:
        read_bwd(
            program - programs,
            y_ptr,
            grad_u_ptr,
            grad_packed_ptr,
            raw_ptr,
            alpha_pre_ptr,
            bias_ptr,
            projected_ptr,
            radial_ptr + T,
            partial_ptr + (program - programs),
            columns,
            packed_ptr,
            norm_weight_ptr,
            norm_inverse_rms_ptr,
            norm_grad_u_ptr,
            norm_partial_ptr,
            T,
            C,
            N,
            NP,
            M,
            PARTS,
            PROJECTION,
            HAS_GRAD_PACKED,
            HAS_NORM,
            BT,
            BC,
            VECTOR,
            STAGES,
        )


@triton.jit
def load_gradient(
    grad_packed_ptr,
    first_row,
    tokens,
    T,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_GRAD_PACKED: tl.constexpr,
):
    """Of ROWS rows of the mappings, [tokens, PADDED]; zeros where there is none."""
    grad = tl.zeros([tokens.shape[0], PADDED], tl.float32)
    if HAS_GRAD_PACKED:
        grad = load_block(grad_packed_ptr, first_row, tokens, T, ROWS, PADDED)
    return grad


@triton.jit
def store_radial(radial_ptr, radial, inverse_rms, tokens, T, K: tl.constexpr):
    """raw = proj / rms, rms^2 = mean(x^2) + eps: grad x += -(grad_raw . raw) / (K rms^2) x."""
    tl.store(radial_ptr + tokens, -radial * inverse_rms * inverse_rms / K, mask=tokens < T)


@triton.jit
def later_bwd(
    tokens,
    grad_packed_ptr,
    raw_ptr,
    alpha_pre_ptr,
    alpha_post_ptr,
    alpha_res_ptr,
    bias_ptr,
    matrices_ptr,
    projected_ptr,
    radial_ptr,
    partial_ptr,
    columns,
    history_ptr,
    T,
    eps,
    C: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    NN: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    PROJECTION: tl.constexpr,
    ITERATIONS: tl.constexpr,
    SINGLE_PASS: tl.constexpr,
    HAS_GRAD_PACKED: tl.constexpr,
):
    """Of H_post and H_res, and in SINGLE_PASS H_pre: their gradients are in ``grad_packed``."""
    inverse_rms = tl.load(raw_ptr + M * T + tokens, mask=tokens < T, other=0.0)
    radial = vector_bwd(
        load_gradient(grad_packed_ptr, N, tokens, T, N, NP, HAS_GRAD_PACKED),
        N,
        2.0,
        raw_ptr,
        alpha_post_ptr,
        bias_ptr,
        projected_ptr,
        partial_ptr,
        columns,
        tokens,
        inverse_rms,
        T,
        N,
        NP,
        M,
        PARTS,
        PROJECTION,
    )
    if SINGLE_PASS:
        radial += vector_bwd(
            load_gradient(grad_packed_ptr, 0, tokens, T, N, NP, HAS_GRAD_PACKED),
            0,
            1.0,
            raw_ptr,
            alpha_pre_ptr,
            bias_ptr,
            projected_ptr,
            partial_ptr,
            columns,
            tokens,
            inverse_rms,
            T,
            N,
            NP,
            M,
            PARTS,
            PROJECTION,
        )
    if PROJECTION != "identity":
        grad_res = load_gradient(grad_packed_ptr, 2 * N, tokens, T, N * N, NN, HAS_GRAD_PACKED)
        if PROJECTION == "permutation":
            radial += permutation_bwd(
                grad_res,
                raw_ptr,
                alpha_res_ptr,
                bias_ptr,
                matrices_ptr,
                projected_ptr,
                partial_ptr,
                columns,
                tokens,
                inverse_rms,
                T,
                N,
                NN,
                M,
                PARTS,
            )
        else:
            radial += matrix_bwd(
                grad_res,
                raw_ptr,
                alpha_res_ptr,
                bias_ptr,
                projected_ptr,
                partial_ptr,
                columns,
                history_ptr,
                tokens,
                inverse_rms,
                T,
                eps,
                N,
                NN,
                M,
                PARTS,
                PROJECTION,
                ITERATIONS,
            )
    store_radial(radial_ptr, radial, inverse_rms, tokens, T, N * C)


@triton.jit
def read_bwd(
    program,
    y_ptr,
    grad_u_ptr,
    grad_packed_ptr,
    raw_ptr,
    alpha_ptr,
    bias_ptr,
    projected_ptr,
    radial_ptr,
    partial_ptr,
    columns,
    packed_ptr,
    norm_weight_ptr,
    norm_inverse_rms_ptr,
    norm_grad_u_ptr,
    norm_partial_ptr,
    T,
    C: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    PROJECTION: tl.constexpr,
    HAS_GRAD_PACKED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Of H_pre, and with HAS_NORM of u before its norm."""
    first = program.to(tl.int64) * BT
    tokens = first + tl.arange(0, BT)
    live = tokens < T
    index = tl.arange(0, NP)
    rows = tl.arange(0, BT)[:, None]
    y_ptr += first * (N * C)
    grad_u_ptr += first * C
    if HAS_NORM:
        norm_grad_u_ptr += first * C
        norm_partial_ptr += program.to(tl.int64) * C
    grad_pre = load_gradient(grad_packed_ptr, 0, tokens, T, N, NP, HAS_GRAD_PACKED)
    sums = zero_sums(N, BT, BC // VECTOR)
    if HAS_NORM:
        read = load_coefficients(packed_ptr, 0, tokens, live, T, N)
        norm_inverse_rms = tl.load(norm_inverse_rms_ptr + tokens, mask=live, other=0.0)
        u_sums = zero_sums(N + 1, BT, BC // VECTOR)
    for c in tl.range(0, C, BC, num_stages=STAGES):
        mask = channel_mask(live, c, C, BC)
        y = load_streams(y_ptr + rows * (N * C), c, mask, N, C, BC, "")
        u_pointers = grad_u_ptr + rows * C + (c + tl.arange(0, BC))[None, :]
        grad_u = widened(tl.load(u_pointers, mask=mask, other=0.0))
        if HAS_NORM:
            # The norm read u as it is rounded; it is kept until its gradient takes its place.
            channels = c + tl.arange(0, BC)
            u = pre_mix(y, read, N).to(norm_grad_u_ptr.dtype.element_ty)
            tl.store(norm_grad_u_ptr + rows * C + channels[None, :], u, mask=mask)
            u = widened(u)
            store_norm_partial(norm_partial_ptr, grad_u, u, norm_inverse_rms, channels, C)
            grad_u *= load_norm_weight(norm_weight_ptr, channels, C)[None, :]
            added = (u_sums[0] + lane_sums(grad_u * u, BT, BC, VECTOR),)
            for i in tl.static_range(N):
                added = added + (u_sums[i + 1] + lane_sums(u * y[i], BT, BC, VECTOR),)
            u_sums = added
        # u = sum_i H_pre[i] x[i]: grad_pre[i] = sum_c grad_u x[i]
        added = ()
        for i in tl.static_range(N):
            added = added + (sums[i] + lane_sums(grad_u * y[i], BT, BC, VECTOR),)
        sums = added
    if HAS_NORM:
        # v = w u r, r = 1 / sqrt(mean(u^2) + eps):
        # grad_u = r (w grad_v - r^2 mean(w grad_v u) u)
        slope = tl.sum(u_sums[0], axis=1) / C * norm_inverse_rms * norm_inverse_rms
        normalise_bwd(
            norm_grad_u_ptr + rows * C,
            grad_u_ptr + rows * C,
            norm_weight_ptr,
            norm_inverse_rms,
            slope,
            live,
            C,
            BC,
            STAGES,
        )
    for i in tl.static_range(N):
        total = tl.sum(sums[i], axis=1)
        if HAS_NORM:
            total = norm_inverse_rms * (total - slope * tl.sum(u_sums[i + 1], axis=1))
        grad_pre += tl.where((index == i)[None, :], total[:, None], 0.0)
    inverse_rms = tl.load(raw_ptr + M * T + tokens, mask=live, other=0.0)
    radial = vector_bwd(
        grad_pre,
        0,
        1.0,
        raw_ptr,
        alpha_ptr,
        bias_ptr,
        projected_ptr,
        partial_ptr,
        columns,
        tokens,
        inverse_rms,
        T,
        N,
        NP,
        M,
        PARTS,
        PROJECTION,
    )
    store_radial(radial_ptr, radial, inverse_rms, tokens, T, N * C)
