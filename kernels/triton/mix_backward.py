"""Backward, first pass: from the gradients of u and of the mappings to those of the raw logits."""

import triton
import triton.language as tl

from mhc_megatron.kernels.triton.coefficients import (
    gate,
    gate_bwd,
    load_bias,
    load_block,
    permutation_logit,
    sigmoid_bwd,
)
from mhc_megatron.kernels.triton.norm import (
    load_norm_weight,
    normalise_bwd,
    store_norm_partial,
)
from mhc_megatron.kernels.triton.residual import (
    block_of,
    entries_of,
    first_iteration_bwd,
    later_iterations_bwd,
    load_permutation,
)
from mhc_megatron.kernels.triton.tile_math import (
    channel_mask,
    lane_sums,
    load_coefficients,
    load_streams,
    pre_mix,
    token_rows,
    zero_sums,
)


@triton.jit
def store_projected(
    projected_ptr, grad, row, tokens, mask, T, M: tl.constexpr, PARTS: tl.constexpr
):
    """Rows of the gradient of ``vec(x) phi``; in two bfloat16 parts, as ``split_weight``."""
    pointers = projected_ptr + row * T + tokens
    high = grad.to(projected_ptr.dtype.element_ty)
    tl.store(pointers, high, mask=mask)
    if PARTS == 2:
        low = grad - high.to(tl.float32)
        tl.store(pointers + M * T, low.to(projected_ptr.dtype.element_ty), mask=mask)


@triton.jit
def write_partial(partial_ptr, sums, rows, mask):
    """This program's sums, of ``reduce_partials``'s [rows, programs]."""
    tl.store(partial_ptr + rows * tl.num_programs(0) + tl.program_id(0), sums, mask=mask)


@triton.jit
def write_gradients(
    grad,
    raw,
    alpha,
    first_row: tl.constexpr,
    projected_ptr,
    partial_ptr,
    inverse_rms,
    tokens,
    T,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    PROJECTION: tl.constexpr,
):
    """From ``grad``, of ROWS logits [BT, PADDED]; returns ``sum(grad_raw * raw)`` per token."""
    index = tl.arange(0, PADDED)
    mask = (index < ROWS)[None, :] & (tokens < T)[:, None]
    grad = tl.where(mask, grad, 0.0)
    grad_raw, grad_gate = gate_bwd(grad, raw, alpha, PROJECTION)
    write_partial(partial_ptr, tl.sum(grad, axis=0), first_row + index, index < ROWS)
    write_partial(partial_ptr, tl.sum(grad_gate, axis=0), M + first_row + index, index < ROWS)
    rows = (first_row + index)[None, :]
    projected = grad_raw * inverse_rms[:, None]
    store_projected(projected_ptr, projected, rows, tokens[:, None], mask, T, M, PARTS)
    return tl.sum(grad_raw * raw, axis=1)


@triton.jit
def vector_bwd(
    grad,
    first_row: tl.constexpr,
    scale: tl.constexpr,
    raw_ptr,
    alpha_ptr,
    bias_ptr,
    projected_ptr,
    partial_ptr,
    tokens,
    inverse_rms,
    T,
    N: tl.constexpr,
    NP: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    PROJECTION: tl.constexpr,
):
    """H_pre or H_post from [BT, NP] ``grad``; returns as ``write_gradients``."""
    raw = load_block(raw_ptr, first_row, tokens, T, N, NP)
    alpha = tl.load(alpha_ptr)
    if PROJECTION != "unconstrained":
        bias = load_bias(bias_ptr, first_row, N, NP)
        grad = sigmoid_bwd(grad, gate(raw, alpha, bias, PROJECTION), scale)
    return write_gradients(
        grad,
        raw,
        alpha,
        first_row,
        projected_ptr,
        partial_ptr,
        inverse_rms,
        tokens,
        T,
        N,
        NP,
        M,
        PARTS,
        PROJECTION,
    )


@triton.jit
def matrix_bwd(
    grad,
    raw_ptr,
    alpha_ptr,
    bias_ptr,
    projected_ptr,
    partial_ptr,
    history_ptr,
    tokens,
    inverse_rms,
    T,
    eps,
    N: tl.constexpr,
    NN: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    PROJECTION: tl.constexpr,
    ITERATIONS: tl.constexpr,
):
    """H_res of n^2 logits from [BT, NN] ``grad``; returns as ``write_gradients``."""
    raw = load_block(raw_ptr, 2 * N, tokens, T, N * N, NN)
    alpha = tl.load(alpha_ptr)
    if PROJECTION != "unconstrained":
        V4: tl.constexpr = PROJECTION == "sinkhorn_v4"
        # log2, of at most 64; a constexpr of Triton 3.3 has no bit_length.
        LEVELS: tl.constexpr = (NN > 1) + (NN > 2) + (NN > 4) + (NN > 8) + (NN > 16) + (NN > 32)
        logits = gate(raw, alpha, load_bias(bias_ptr, 2 * N, N * N, NN), PROJECTION)
        entries = entries_of(logits, N * N, LEVELS)
        grads = later_iterations_bwd(
            entries,
            entries_of(grad, N * N, LEVELS),
            eps,
            history_ptr,
            tokens,
            tokens < T,
            T,
            N,
            ITERATIONS,
            V4,
        )
        if N > 4:
            # Many logits are loaded again: a thread cannot keep them through the iterations.
            raw = load_block(raw_ptr, 2 * N, tokens, T, N * N, NN)
            logits = gate(raw, alpha, load_bias(bias_ptr, 2 * N, N * N, NN), PROJECTION)
            entries = entries_of(logits, N * N, LEVELS)
        grads = first_iteration_bwd(entries, grads, eps, N, V4)
        grad = block_of(grads, N * N, LEVELS)
    return write_gradients(
        grad,
        raw,
        alpha,
        2 * N,
        projected_ptr,
        partial_ptr,
        inverse_rms,
        tokens,
        T,
        N * N,
        NN,
        M,
        PARTS,
        PROJECTION,
    )


@triton.jit
def permutation_bwd(
    grad,
    raw_ptr,
    alpha_ptr,
    bias_ptr,
    matrices_ptr,
    projected_ptr,
    partial_ptr,
    tokens,
    inverse_rms,
    T,
    N: tl.constexpr,
    NN: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
):
    """H_res of n! logits; returns as ``write_gradients``."""
    R: tl.constexpr = M - 2 * N
    alpha = tl.load(alpha_ptr)
    highest, total, mean = permutation_moments(
        grad, raw_ptr, alpha, bias_ptr, matrices_ptr, tokens, T, N, NN, R
    )
    radial = tl.zeros(tokens.shape, tl.float32)
    for k in range(R):
        raw = tl.load(raw_ptr + (2 * N + k) * T + tokens, mask=tokens < T, other=0.0)
        logit = permutation_logit(raw_ptr, alpha, bias_ptr, k, tokens, T, N)
        # weights = logits.softmax(dim=-1); res = sum_k weights_k P_k
        grad_weight = tl.sum(grad * load_permutation(matrices_ptr, k, N, NN), axis=1)
        grad_logit = tl.exp(logit - highest) / total * (grad_weight - mean)
        grad_logit = tl.where(tokens < T, grad_logit, 0.0)
        write_partial(partial_ptr, tl.sum(grad_logit, axis=0), 2 * N + k, True)
        write_partial(partial_ptr, tl.sum(grad_logit * raw, axis=0), M + 2 * N + k, True)
        grad_raw = grad_logit * alpha
        projected = grad_raw * inverse_rms
        store_projected(projected_ptr, projected, 2 * N + k, tokens, tokens < T, T, M, PARTS)
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
    T,
    N: tl.constexpr,
    NN: tl.constexpr,
    R: tl.constexpr,
):
    """Maximum and sum of the softmax, and the mean of the weights' gradients under it."""
    highest = tl.full(tokens.shape, float("-inf"), tl.float32)
    total = tl.zeros(tokens.shape, tl.float32)
    mean = tl.zeros(tokens.shape, tl.float32)
    for k in range(R):
        logit = permutation_logit(raw_ptr, alpha, bias_ptr, k, tokens, T, N)
        grad_weight = tl.sum(grad * load_permutation(matrices_ptr, k, N, NN), axis=1)
        higher = tl.maximum(highest, logit)
        shrink = tl.exp(highest - higher)
        share = tl.exp(logit - higher)
        total = total * shrink + share
        mean = mean * shrink + share * grad_weight
        highest = higher
    return highest, total, mean / total


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
    BT: tl.constexpr,
    BC: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of ``vec(y) phi`` ([PARTS * M, T]), of the RMS, and parts of bias and alpha.

    ``radial``: [T], c in ``grad y += c y``, what the division by the RMS contributes.
    ``partial``: [2 M, programs], sums over the program's tokens of the logits' gradients and of
    their products with the raw logits. ``history``: scratch of ``sinkhorn_fwd``.
    HAS_NORM: ``grad_u`` is the gradient of the normalised u. u's own is written to
    ``norm_grad_u``, and parts of the norm's weight to ``norm_partial``, [programs, C].
    """
    T = tl.cast(T, tl.int64)
    first, tokens, live = token_rows(T, BT)
    K: tl.constexpr = N * C
    index = tl.arange(0, NP)
    if HAS_GRAD_PACKED:
        grad_pre = load_block(grad_packed_ptr, 0, tokens, T, N, NP)
        grad_post = load_block(grad_packed_ptr, N, tokens, T, N, NP)
    else:
        grad_pre = tl.zeros([BT, NP], tl.float32)
        grad_post = tl.zeros([BT, NP], tl.float32)
    if not SINGLE_PASS:
        sums = zero_sums(N, BT, BC // VECTOR)
        rows = tl.arange(0, BT)[:, None]
        y_ptr += first * K
        grad_u_ptr += first * C
        if HAS_NORM:
            read = load_coefficients(packed_ptr, 0, tokens, live, T, N)
            norm_inverse_rms = tl.load(norm_inverse_rms_ptr + tokens, mask=live, other=0.0)
            norm_grad_u_ptr += first * C
            u_sums = zero_sums(N + 1, BT, BC // VECTOR)
        for c in tl.range(0, C, BC, num_stages=STAGES):
            mask = channel_mask(live, c, C, BC)
            y = load_streams(y_ptr + rows * K, c, mask, N, C, BC, "")
            u_pointers = grad_u_ptr + rows * C + (c + tl.arange(0, BC))[None, :]
            grad_u = tl.load(u_pointers, mask=mask, other=0.0).to(tl.float32)
            if HAS_NORM:
                # The norm read u as it is rounded; it is kept until its gradient takes its place.
                columns = c + tl.arange(0, BC)
                u = pre_mix(y, read, N).to(norm_grad_u_ptr.dtype.element_ty)
                tl.store(norm_grad_u_ptr + rows * C + columns[None, :], u, mask=mask)
                u = u.to(tl.float32)
                store_norm_partial(norm_partial_ptr, grad_u, u, norm_inverse_rms, columns, C)
                grad_u *= load_norm_weight(norm_weight_ptr, columns, C)[None, :]
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
        alpha_pre_ptr,
        bias_ptr,
        projected_ptr,
        partial_ptr,
        tokens,
        inverse_rms,
        T,
        N,
        NP,
        M,
        PARTS,
        PROJECTION,
    )
    radial += vector_bwd(
        grad_post,
        N,
        2.0,
        raw_ptr,
        alpha_post_ptr,
        bias_ptr,
        projected_ptr,
        partial_ptr,
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
        if HAS_GRAD_PACKED:
            grad_res = load_block(grad_packed_ptr, 2 * N, tokens, T, N * N, NN)
        else:
            grad_res = tl.zeros([BT, NN], tl.float32)
        if PROJECTION == "permutation":
            radial += permutation_bwd(
                grad_res,
                raw_ptr,
                alpha_res_ptr,
                bias_ptr,
                matrices_ptr,
                projected_ptr,
                partial_ptr,
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
    # raw = proj / rms, rms^2 = mean(x^2) + eps: grad x += -(grad_raw . raw) / (K rms^2) x
    tl.store(radial_ptr + tokens, -radial * inverse_rms * inverse_rms / K, mask=live)
