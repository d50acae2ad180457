"""Device functions: raw logits to the mappings of a tile of tokens, and their backward.

T and ``tokens`` are int64; rows of ``raw`` and ``packed`` are loaded as [BT] or as blocks
[BT, PADDED], PADDED a power of two.
"""

import triton
import triton.language as tl

from mhc_megatron.kernels.triton.residual import (
    block_of,
    entries_of,
    load_permutation,
    sinkhorn_fwd,
)


@triton.jit
def block_pointers(base_ptr, first_row, tokens, T, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """Rows ``first_row`` to ``first_row + ROWS`` of [rows, T], as [BT, PADDED]."""
    index = tl.arange(0, PADDED)
    rows = (first_row + index) * T
    mask = (index < ROWS)[None, :] & (tokens < T)[:, None]
    return base_ptr + rows[None, :] + tokens[:, None], mask


@triton.jit
def load_block(base_ptr, first_row, tokens, T, ROWS: tl.constexpr, PADDED: tl.constexpr):
    pointers, mask = block_pointers(base_ptr, first_row, tokens, T, ROWS, PADDED)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_bias(bias_ptr, first_row, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """[1, PADDED]."""
    index = tl.arange(0, PADDED)
    return tl.load(bias_ptr + first_row + index, mask=index < ROWS, other=0.0)[None, :]


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
def permutation_statistics(raw_ptr, alpha, bias_ptr, tokens, T, N: tl.constexpr, R: tl.constexpr):
    """Maximum and sum of the softmax over the n! logits, each [BT]."""
    highest = tl.full(tokens.shape, float("-inf"), tl.float32)
    total = tl.zeros(tokens.shape, tl.float32)
    for k in range(R):
        logit = permutation_logit(raw_ptr, alpha, bias_ptr, k, tokens, T, N)
        higher = tl.maximum(highest, logit)
        total = total * tl.exp(highest - higher) + tl.exp(logit - higher)
        highest = higher
    return highest, total


@triton.jit
def permutation_logit(raw_ptr, alpha, bias_ptr, k, tokens, T, N: tl.constexpr):
    raw = tl.load(raw_ptr + (2 * N + k) * T + tokens, mask=tokens < T, other=0.0)
    return alpha * raw + tl.load(bias_ptr + 2 * N + k)


@triton.jit
def write_pre(
    raw_ptr,
    alpha_ptr,
    bias_ptr,
    packed_ptr,
    tokens,
    T,
    eps,
    N: tl.constexpr,
    NP: tl.constexpr,
    PROJECTION: tl.constexpr,
):
    """H_pre of the tile's tokens, to ``packed``: the mapping that reads the streams."""
    pre = load_block(raw_ptr, 0, tokens, T, N, NP)
    pre = gate(pre, tl.load(alpha_ptr), load_bias(bias_ptr, 0, N, NP), PROJECTION)
    if PROJECTION != "unconstrained":
        # pre = pre.sigmoid() (+ eps)
        pre = tl.sigmoid(pre)
        if PROJECTION == "sinkhorn_v4":
            pre += eps
    pointers, mask = block_pointers(packed_ptr, 0, tokens, T, N, NP)
    tl.store(pointers, pre, mask=mask)


@triton.jit
def write_later(
    raw_ptr,
    alpha_post_ptr,
    alpha_res_ptr,
    bias_ptr,
    matrices_ptr,
    packed_ptr,
    tokens,
    T,
    eps,
    N: tl.constexpr,
    NP: tl.constexpr,
    NN: tl.constexpr,
    M: tl.constexpr,
    PROJECTION: tl.constexpr,
    ITERATIONS: tl.constexpr,
):
    """H_post and H_res likewise, which nobody asks for before the branch is done."""
    post = load_block(raw_ptr, N, tokens, T, N, NP)
    post = gate(post, tl.load(alpha_post_ptr), load_bias(bias_ptr, N, N, NP), PROJECTION)
    if PROJECTION != "unconstrained":
        # post = 2 * post.sigmoid()
        post = 2.0 * tl.sigmoid(post)

    res_pointers, res_mask = block_pointers(packed_ptr, 2 * N, tokens, T, N * N, NN)
    if PROJECTION == "identity":
        entry = tl.arange(0, NN)
        res = tl.zeros(res_pointers.shape, tl.float32)
        res += tl.where(entry // N == entry % N, 1.0, 0.0)[None, :]
    elif PROJECTION == "permutation":
        # res = sum_k softmax(logits)_k P_k
        alpha = tl.load(alpha_res_ptr)
        highest, total = permutation_statistics(raw_ptr, alpha, bias_ptr, tokens, T, N, M - 2 * N)
        res = tl.zeros(res_pointers.shape, tl.float32)
        for k in range(M - 2 * N):
            logit = permutation_logit(raw_ptr, alpha, bias_ptr, k, tokens, T, N)
            weight = tl.exp(logit - highest) / total
            res += weight[:, None] * load_permutation(matrices_ptr, k, N, NN)
    else:
        res = load_block(raw_ptr, 2 * N, tokens, T, N * N, NN)
        res = gate(res, tl.load(alpha_res_ptr), load_bias(bias_ptr, 2 * N, N * N, NN), PROJECTION)
        if PROJECTION != "unconstrained":
            V4: tl.constexpr = PROJECTION == "sinkhorn_v4"
            # log2, of at most 64; a constexpr of Triton 3.3 has no bit_length.
            LEVELS: tl.constexpr = (NN > 1) + (NN > 2) + (NN > 4) + (NN > 8) + (NN > 16) + (NN > 32)
            logits = entries_of(res, N * N, LEVELS)
            live = tokens < T
            res = sinkhorn_fwd(logits, eps, raw_ptr, tokens, live, T, N, ITERATIONS, V4, False)
            res = block_of(res, N * N, LEVELS)

    pointers, mask = block_pointers(packed_ptr, N, tokens, T, N, NP)
    tl.store(pointers, post, mask=mask)
    tl.store(res_pointers, res, mask=res_mask)


@triton.jit
def sigmoid_bwd(grad, logit, scale):
    """Gradient of ``scale * logit.sigmoid()``."""
    value = tl.sigmoid(logit)
    return grad * scale * value * (1.0 - value)
