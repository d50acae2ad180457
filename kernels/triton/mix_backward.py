"""Backward, first pass: from the gradients of u and of the mappings to those of the raw logits."""

import triton
import triton.language as tl

from mhc_megatron.kernels.triton.coefficients import (
    gate_bwd,
    logits_of,
    permutation_logit,
    sigmoid_bwd,
)
from mhc_megatron.kernels.triton.residual import inner, load_permutation, sinkhorn_bwd
from mhc_megatron.kernels.triton.tile_math import (
    channel_mask,
    lane_sums,
    load_coefficients,
    load_streams,
    token_rows,
    zero_sums,
)


@triton.jit
def write_logit_gradient(
    grad_logit,
    grad_raw,
    grad_gate,
    row,
    projected_ptr,
    partial_ptr,
    inverse_rms,
    tokens,
    live,
    T,
    M: tl.constexpr,
    PARTS: tl.constexpr,
):
    """What one logit contributes: to bias and alpha, summed over the tile, and to ``vec(x) phi``.

    The last in two bfloat16 parts, as ``split_weight``.
    """
    tl.store(partial_ptr + row, tl.sum(grad_logit, axis=0))
    tl.store(partial_ptr + M + row, tl.sum(grad_gate, axis=0))
    projected = grad_raw * inverse_rms
    pointers = projected_ptr + row * T + tokens
    high = projected.to(projected_ptr.dtype.element_ty)
    tl.store(pointers, high, mask=live)
    if PARTS == 2:
        low = projected - high.to(tl.float32)
        tl.store(pointers + M * T, low.to(projected_ptr.dtype.element_ty), mask=live)


@triton.jit
def write_gradients(
    grads,
    raw,
    alpha,
    first_row,
    projected_ptr,
    partial_ptr,
    inverse_rms,
    tokens,
    live,
    T,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    PROJECTION: tl.constexpr,
):
    """Of ROWS logits; returns ``sum(grad_raw * raw)`` per token."""
    radial = tl.zeros(tokens.shape, tl.float32)
    for row in tl.static_range(ROWS):
        grad = tl.where(live, grads[row], 0.0)
        grad_raw, grad_gate = gate_bwd(grad, raw[row], alpha, PROJECTION)
        write_logit_gradient(
            grad,
            grad_raw,
            grad_gate,
            first_row + row,
            projected_ptr,
            partial_ptr,
            inverse_rms,
            tokens,
            live,
            T,
            M,
            PARTS,
        )
        radial += grad_raw * raw[row]
    return radial


@triton.jit
def sigmoids_bwd(grads, logits, scale: tl.constexpr, ROWS: tl.constexpr):
    found = ()
    for row in tl.static_range(ROWS):
        found = found + (sigmoid_bwd(grads[row], logits[row], scale),)
    return found


@triton.jit
def permutation_bwd(
    grad,
    raw_ptr,
    alpha,
    bias_ptr,
    matrices_ptr,
    projected_ptr,
    partial_ptr,
    inverse_rms,
    tokens,
    live,
    T,
    N: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
):
    """H_res of n! logits; returns as ``write_gradients``."""
    R: tl.constexpr = M - 2 * N
    highest, total, mean = permutation_moments(
        grad, raw_ptr, alpha, bias_ptr, matrices_ptr, tokens, live, T, N, R
    )
    radial = tl.zeros(tokens.shape, tl.float32)
    for k in range(R):
        raw = tl.load(raw_ptr + (2 * N + k) * T + tokens, mask=live, other=0.0)
        logit = permutation_logit(raw_ptr, alpha, bias_ptr, k, tokens, live, T, N)
        # weights = logits.softmax(dim=-1); res = sum_k weights_k P_k
        grad_weight = inner(grad, load_permutation(matrices_ptr, k, N), N)
        grad_logit = tl.exp(logit - highest) / total * (grad_weight - mean)
        grad_logit = tl.where(live, grad_logit, 0.0)
        grad_raw = grad_logit * alpha
        write_logit_gradient(
            grad_logit,
            grad_raw,
            grad_logit * raw,
            2 * N + k,
            projected_ptr,
            partial_ptr,
            inverse_rms,
            tokens,
            live,
            T,
            M,
            PARTS,
        )
        radial += grad_raw * raw
    return radial


@triton.jit
def permutation_moments(
    grad,
    raw_ptr,
    alpha,
    bias_ptr,
    matrices_ptr,
    tokens,
    live,
    T,
    N: tl.constexpr,
    R: tl.constexpr,
):
    """Maximum and sum of the softmax, and the mean of the weights' gradients under it."""
    highest = tl.full(tokens.shape, float("-inf"), tl.float32)
    total = tl.zeros(tokens.shape, tl.float32)
    mean = tl.zeros(tokens.shape, tl.float32)
    for k in range(R):
        logit = permutation_logit(raw_ptr, alpha, bias_ptr, k, tokens, live, T, N)
        grad_weight = inner(grad, load_permutation(matrices_ptr, k, N), N)
        higher = tl.maximum(highest, logit)
        shrink = tl.exp(highest - higher)
        share = tl.exp(logit - higher)
        total = total * shrink + share
        mean = mean * shrink + share * grad_weight
        highest = higher
    return highest, total, mean / total


@triton.jit
def zero_rows(tokens, ROWS: tl.constexpr):
    rows = ()
    for _ in tl.static_range(ROWS):
        rows = rows + (tl.zeros(tokens.shape, tl.float32),)
    return rows


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
    T,
    eps,
    C: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    PROJECTION: tl.constexpr,
    ITERATIONS: tl.constexpr,
    SINGLE_PASS: tl.constexpr,
    HAS_GRAD_PACKED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of ``vec(y) phi`` ([PARTS * M, T]), of the RMS, and parts of bias and alpha.

    ``radial``: [T], c in ``grad y += c y``, what the division by the RMS contributes.
    ``partial``: [programs, 2 M], sums over the program's tokens of the logits' gradients and of
    their products with the raw logits. ``history``: scratch of ``sinkhorn_fwd``.
    """
    T = tl.cast(T, tl.int64)
    first, tokens, live = token_rows(T, BT)
    K: tl.constexpr = N * C
    if HAS_GRAD_PACKED:
        grad_pre = load_coefficients(grad_packed_ptr, 0, tokens, live, T, N)
        grad_post = load_coefficients(grad_packed_ptr, N, tokens, live, T, N)
    else:
        grad_pre = zero_rows(tokens, N)
        grad_post = zero_rows(tokens, N)
    if not SINGLE_PASS:
        sums = zero_sums(N, BT, BC // VECTOR)
        rows = tl.arange(0, BT)[:, None]
        y_ptr += first * K
        grad_u_ptr += first * C
        for c in tl.range(0, C, BC, num_stages=STAGES):
            mask = channel_mask(live, c, C, BC)
            y = load_streams(y_ptr + rows * K, c, mask, N, C, BC)
            u_pointers = grad_u_ptr + rows * C + (c + tl.arange(0, BC))[None, :]
            grad_u = tl.load(u_pointers, mask=mask, other=0.0).to(tl.float32)
            # u = sum_i H_pre[i] x[i]: grad_pre[i] = sum_c grad_u x[i]
            added = ()
            for i in tl.static_range(N):
                added = added + (sums[i] + lane_sums(grad_u * y[i], BT, BC, VECTOR),)
            sums = added
        read = ()
        for i in tl.static_range(N):
            read = read + (grad_pre[i] + tl.sum(sums[i], axis=1),)
        grad_pre = read

    inverse_rms = tl.load(raw_ptr + M * T + tokens, mask=live, other=0.0)
    partial_ptr += tl.program_id(0).to(tl.int64) * (2 * M)
    alpha_pre, alpha_post = tl.load(alpha_pre_ptr), tl.load(alpha_post_ptr)
    raw_pre = load_coefficients(raw_ptr, 0, tokens, live, T, N)
    raw_post = load_coefficients(raw_ptr, N, tokens, live, T, N)
    if PROJECTION != "unconstrained":
        pre = logits_of(raw_pre, 0, alpha_pre, bias_ptr, N, PROJECTION)
        post = logits_of(raw_post, N, alpha_post, bias_ptr, N, PROJECTION)
        grad_pre = sigmoids_bwd(grad_pre, pre, 1.0, N)
        grad_post = sigmoids_bwd(grad_post, post, 2.0, N)
    radial = write_gradients(
        grad_pre,
        raw_pre,
        alpha_pre,
        0,
        projected_ptr,
        partial_ptr,
        inverse_rms,
        tokens,
        live,
        T,
        M,
        PARTS,
        N,
        PROJECTION,
    )
    radial += write_gradients(
        grad_post,
        raw_post,
        alpha_post,
        N,
        projected_ptr,
        partial_ptr,
        inverse_rms,
        tokens,
        live,
        T,
        M,
        PARTS,
        N,
        PROJECTION,
    )
    if PROJECTION != "identity":
        if HAS_GRAD_PACKED:
            grad_res = load_coefficients(grad_packed_ptr, 2 * N, tokens, live, T, N * N)
        else:
            grad_res = zero_rows(tokens, N * N)
        alpha_res = tl.load(alpha_res_ptr)
        if PROJECTION == "permutation":
            radial += permutation_bwd(
                grad_res,
                raw_ptr,
                alpha_res,
                bias_ptr,
                matrices_ptr,
                projected_ptr,
                partial_ptr,
                inverse_rms,
                tokens,
                live,
                T,
                N,
                M,
                PARTS,
            )
        else:
            raw_res = load_coefficients(raw_ptr, 2 * N, tokens, live, T, N * N)
            if PROJECTION != "unconstrained":
                V4: tl.constexpr = PROJECTION == "sinkhorn_v4"
                res = logits_of(raw_res, 2 * N, alpha_res, bias_ptr, N * N, PROJECTION)
                grad_res = sinkhorn_bwd(
                    res, grad_res, eps, history_ptr, tokens, live, T, N, ITERATIONS, V4
                )
            radial += write_gradients(
                grad_res,
                raw_res,
                alpha_res,
                2 * N,
                projected_ptr,
                partial_ptr,
                inverse_rms,
                tokens,
                live,
                T,
                M,
                PARTS,
                N * N,
                PROJECTION,
            )
    # raw = proj / rms, rms^2 = mean(x^2) + eps: grad x += -(grad_raw . raw) / (K rms^2) x
    tl.store(radial_ptr + tokens, -radial * inverse_rms * inverse_rms / K, mask=live)
