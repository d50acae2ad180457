"""Device functions: raw logits to the mappings of a tile of tokens, one token per lane.

T and ``tokens`` are int64; rows of ``raw`` and ``packed`` are tuples of [BT].
"""

import triton
import triton.language as tl

from mhc_megatron.kernels.triton.residual import load_permutation, sinkhorn_fwd
from mhc_megatron.kernels.triton.tile_math import load_coefficients


@triton.jit
def store_rows(base_ptr, rows, first_row, tokens, live, T, ROWS: tl.constexpr):
    for row in tl.static_range(ROWS):
        tl.store(base_ptr + (first_row + row) * T + tokens, rows[row], mask=live)


@triton.jit
def tanh(x):
    """To float32 rounding also near 0, where ``2 sigmoid(2x) - 1`` cancels."""
    square = x * x
    series = 1.0 + square * (
        -1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))
    )
    return tl.where(square < 0.0625, x * series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def gate(raw, alpha, bias, PROJECTION: tl.constexpr):
    """``alpha * raw + bias``; hyper-connections pass raw through tanh first."""
    if PROJECTION == "unconstrained":
        raw = tanh(raw)
    return alpha * raw + bias


@triton.jit
def gate_bwd(grad, raw, alpha, PROJECTION: tl.constexpr):
    """Gradients of raw, and of alpha before it is summed."""
    if PROJECTION == "unconstrained":
        gated = tanh(raw)
        grad_raw = grad * alpha * (1.0 - gated * gated)
    else:
        gated = raw
        grad_raw = grad * alpha
    return grad_raw, grad * gated


@triton.jit
def logits_of(raw, first_row, alpha, bias_ptr, ROWS: tl.constexpr, PROJECTION: tl.constexpr):
    """``gate`` of ROWS rows."""
    logits = ()
    for row in tl.static_range(ROWS):
        bias = tl.load(bias_ptr + first_row + row)
        logits = logits + (gate(raw[row], alpha, bias, PROJECTION),)
    return logits


@triton.jit
def permutation_statistics(
    raw_ptr, alpha, bias_ptr, tokens, live, T, N: tl.constexpr, R: tl.constexpr
):
    """Maximum and sum of the softmax over the n! logits, each [BT]."""
    highest = tl.full(tokens.shape, float("-inf"), tl.float32)
    total = tl.zeros(tokens.shape, tl.float32)
    for k in range(R):
        logit = permutation_logit(raw_ptr, alpha, bias_ptr, k, tokens, live, T, N)
        higher = tl.maximum(highest, logit)
        total = total * tl.exp(highest - higher) + tl.exp(logit - higher)
        highest = higher
    return highest, total


@triton.jit
def permutation_logit(raw_ptr, alpha, bias_ptr, k, tokens, live, T, N: tl.constexpr):
    raw = tl.load(raw_ptr + (2 * N + k) * T + tokens, mask=live, other=0.0)
    return alpha * raw + tl.load(bias_ptr + 2 * N + k)


@triton.jit
def permutation_mixture(
    raw_ptr, alpha, bias_ptr, matrices_ptr, tokens, live, T, N: tl.constexpr, R: tl.constexpr
):
    """``sum_k softmax(logits)_k P_k``, n * n [BT]."""
    highest, total = permutation_statistics(raw_ptr, alpha, bias_ptr, tokens, live, T, N, R)
    res = ()
    for _ in tl.static_range(N * N):
        res = res + (tl.zeros(tokens.shape, tl.float32),)
    for k in range(R):
        logit = permutation_logit(raw_ptr, alpha, bias_ptr, k, tokens, live, T, N)
        weight = tl.exp(logit - highest) / total
        permutation = load_permutation(matrices_ptr, k, N)
        added = ()
        for entry in tl.static_range(N * N):
            added = added + (res[entry] + weight * permutation[entry],)
        res = added
    return res


@triton.jit
def write_mappings(
    raw_ptr,
    alpha_pre_ptr,
    alpha_post_ptr,
    alpha_res_ptr,
    bias_ptr,
    matrices_ptr,
    packed_ptr,
    tokens,
    live,
    T,
    eps,
    N: tl.constexpr,
    M: tl.constexpr,
    PROJECTION: tl.constexpr,
    ITERATIONS: tl.constexpr,
):
    """``mappings`` of the tile's tokens: writes ``packed`` and returns H_pre, n [BT]."""
    raw_pre = load_coefficients(raw_ptr, 0, tokens, live, T, N)
    raw_post = load_coefficients(raw_ptr, N, tokens, live, T, N)
    pre = logits_of(raw_pre, 0, tl.load(alpha_pre_ptr), bias_ptr, N, PROJECTION)
    post = logits_of(raw_post, N, tl.load(alpha_post_ptr), bias_ptr, N, PROJECTION)
    if PROJECTION != "unconstrained":
        # pre = pre.sigmoid() (+ eps), post = 2 * post.sigmoid()
        shift = eps if PROJECTION == "sinkhorn_v4" else 0.0
        pre = sigmoids(pre, 1.0, shift, N)
        post = sigmoids(post, 2.0, 0.0, N)
    store_rows(packed_ptr, pre, 0, tokens, live, T, N)
    store_rows(packed_ptr, post, N, tokens, live, T, N)

    if PROJECTION == "identity":
        for k in tl.static_range(N * N):
            entry = tl.full(tokens.shape, 1.0 if k // N == k % N else 0.0, tl.float32)
            tl.store(packed_ptr + (2 * N + k) * T + tokens, entry, mask=live)
    else:
        alpha_res = tl.load(alpha_res_ptr)
        if PROJECTION == "permutation":
            R: tl.constexpr = M - 2 * N
            res = permutation_mixture(
                raw_ptr, alpha_res, bias_ptr, matrices_ptr, tokens, live, T, N, R
            )
        else:
            raw_res = load_coefficients(raw_ptr, 2 * N, tokens, live, T, N * N)
            res = logits_of(raw_res, 2 * N, alpha_res, bias_ptr, N * N, PROJECTION)
            if PROJECTION != "unconstrained":
                V4: tl.constexpr = PROJECTION == "sinkhorn_v4"
                res = sinkhorn_fwd(res, eps, raw_ptr, tokens, live, T, N, ITERATIONS, V4, False)
        store_rows(packed_ptr, res, 2 * N, tokens, live, T, N * N)
    return pre


@triton.jit
def sigmoids(logits, scale: tl.constexpr, shift, ROWS: tl.constexpr):
    """``scale * logits.sigmoid() + shift``."""
    values = ()
    for row in tl.static_range(ROWS):
        values = values + (scale * tl.sigmoid(logits[row]) + shift,)
    return values


@triton.jit
def sigmoid_bwd(grad, logit, scale):
    """Gradient of ``scale * logit.sigmoid()``."""
    value = tl.sigmoid(logit)
    return grad * scale * value * (1.0 - value)
