"""Device functions of ``mix_bwd``: gradients of a tile's mappings to those of the raw logits.

Those of alpha and bias are sums over the tile's tokens.
"""

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
from mhc_megatron.kernels.triton.residual import (
    block_of,
    entries_of,
    first_iteration_bwd,
    later_iterations_bwd,
    load_permutation,
)
from mhc_megatron.kernels.triton.tile_math import in_two_parts


@triton.jit
def store_projected(
    projected_ptr, grad, row, tokens, mask, T, M: tl.constexpr, PARTS: tl.constexpr
):
    """Rows of the gradient of ``vec(x) phi``; in two bfloat16 parts, as ``split_weight``."""
    pointers = projected_ptr + row * T + tokens
    if PARTS == 2:
        high, low = in_two_parts(grad)
        tl.store(pointers, high, mask=mask)
        tl.store(pointers + M * T, low, mask=mask)
    else:
        tl.store(pointers, grad, mask=mask)


@triton.jit
def write_partial(partial_ptr, columns, sums, rows, mask):
    """A program's sums in its column of ``reduce_partials``'s [rows, columns]."""
    tl.store(partial_ptr + rows * columns, sums, mask=mask)


@triton.jit
def write_gradients(
    grad,
    raw,
    alpha,
    first_row: tl.constexpr,
    projected_ptr,
    partial_ptr,
    columns,
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
    write_partial(partial_ptr, columns, tl.sum(grad, axis=0), first_row + index, index < ROWS)
    gate_sums = tl.sum(grad_gate, axis=0)
    write_partial(partial_ptr, columns, gate_sums, M + first_row + index, index < ROWS)
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
    columns,
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
        columns,
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
    columns,
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
        columns,
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
    columns,
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
        write_partial(partial_ptr, columns, tl.sum(grad_logit, axis=0), 2 * N + k, True)
        gate_sum = tl.sum(grad_logit * raw, axis=0)
        write_partial(partial_ptr, columns, gate_sum, M + 2 * N + k, True)
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
