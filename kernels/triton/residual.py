"""Device functions: residual logits to H_res and back, for a tile of tokens in parallel lanes.

Matrices are [BT, NP, NP] in registers, ``res[t, o, i]``. Where n is not a power of two, the
padding is a separate identity block that no sum mixes with the n x n matrix, so that the
iterations need no masks.
"""

import triton
import triton.language as tl


@triton.jit
def stream_index(NP: tl.constexpr):
    """(o, i) as [1, NP, 1] and [1, 1, NP]."""
    index = tl.arange(0, NP)
    return index[None, :, None], index[None, None, :]


@triton.jit
def log_column_softmax(logits):
    """``logits.log_softmax(dim=-2)``."""
    shifted = logits - tl.max(logits, axis=1)[:, None, :]
    return shifted - tl.log(tl.sum(tl.exp(shifted), axis=1))[:, None, :]


@triton.jit
def pad_logits(logits, N: tl.constexpr, NP: tl.constexpr):
    """Make the padding a separate identity block."""
    o, i = stream_index(NP)
    inside = (o < N) & (i < N)
    return tl.where(inside, logits, tl.where(o == i, 0.0, float("-inf")))


@triton.jit
def first_iteration(log_columns, eps, N: tl.constexpr, NP: tl.constexpr, V4: tl.constexpr):
    """The first iteration of either Sinkhorn, and the divisor of its rows (of ``sinkhorn_v4``)."""
    if V4:
        # res = logits.softmax(dim=-2) + eps
        o, i = stream_index(NP)
        res = tl.exp(log_columns)
        res = tl.where((o < N) & (i < N), res + eps, res)
        # res = res / (res.sum(dim=-1) + eps)
        divisor = tl.sum(res, axis=2) + eps
    else:
        # res = log_columns.softmax(dim=-1)
        res = tl.exp(log_columns - tl.max(log_columns, axis=2)[:, :, None])
        divisor = tl.sum(res, axis=2)
    return res / divisor[:, :, None], divisor


@triton.jit
def sinkhorn_fwd(
    logits,
    eps,
    history_ptr,
    tokens,
    T,
    N: tl.constexpr,
    NP: tl.constexpr,
    ITERATIONS: tl.constexpr,
    V4: tl.constexpr,
    HISTORY: tl.constexpr,
):
    """``sinkhorn`` or ``sinkhorn_v4``; with HISTORY every divisor is kept for ``sinkhorn_bwd``.

    ``history``: [2 * (iterations - 1) * n, T], columns' and rows' divisors of each iteration.
    """
    floor = eps if V4 else 0.0
    res, _ = first_iteration(log_column_softmax(logits), eps, N, NP, V4)
    # A run-time loop: unrolled, 20 iterations take the compiler minutes.
    for step in range(ITERATIONS - 1):
        # res = res / (res.sum(dim=-2) + eps)
        columns = tl.sum(res, axis=1) + floor
        res = res * (1.0 / columns)[:, None, :]
        # res = res / (res.sum(dim=-1) + eps)
        rows = tl.sum(res, axis=2) + floor
        res = res * (1.0 / rows)[:, :, None]
        if HISTORY:
            store_divisor(history_ptr, columns, 2 * step, tokens, T, N, NP)
            store_divisor(history_ptr, rows, 2 * step + 1, tokens, T, N, NP)
    return res


@triton.jit
def divisor_pointers(history_ptr, step, tokens, T, N: tl.constexpr, NP: tl.constexpr):
    index = tl.arange(0, NP)
    rows = (step * N + index) * T
    mask = (index < N)[None, :] & (tokens < T)[:, None]
    return history_ptr + rows[None, :] + tokens[:, None], mask


@triton.jit
def store_divisor(history_ptr, divisor, step, tokens, T, N: tl.constexpr, NP: tl.constexpr):
    pointers, mask = divisor_pointers(history_ptr, step, tokens, T, N, NP)
    tl.store(pointers, divisor, mask=mask)


@triton.jit
def load_divisor(history_ptr, step, tokens, T, N: tl.constexpr, NP: tl.constexpr):
    pointers, mask = divisor_pointers(history_ptr, step, tokens, T, N, NP)
    return tl.load(pointers, mask=mask, other=1.0)


@triton.jit
def sinkhorn_bwd(
    logits,
    grad,
    eps,
    history_ptr,
    tokens,
    T,
    N: tl.constexpr,
    NP: tl.constexpr,
    ITERATIONS: tl.constexpr,
    V4: tl.constexpr,
):
    """The gradient of the logits: the unrolled iterations, walked back through.

    A normalisation ``m' = m / d`` with ``d = sum(m) + eps`` has the gradient
    ``(grad' - sum(grad' m')) / d``, and ``m = m' d`` is had again from the divisors alone.
    """
    res = sinkhorn_fwd(logits, eps, history_ptr, tokens, T, N, NP, ITERATIONS, V4, True)
    # The divisors are read by other threads than wrote them.
    tl.debug_barrier()
    for back in range(ITERATIONS - 1):
        step = 2 * (ITERATIONS - 2 - back)
        # res = res / (res.sum(dim=-1) + eps)
        rows = load_divisor(history_ptr, step + 1, tokens, T, N, NP)
        grad = (grad - tl.sum(grad * res, axis=2)[:, :, None]) * (1.0 / rows)[:, :, None]
        res = res * rows[:, :, None]
        # res = res / (res.sum(dim=-2) + eps)
        columns = load_divisor(history_ptr, step, tokens, T, N, NP)
        grad = (grad - tl.sum(grad * res, axis=1)[:, None, :]) * (1.0 / columns)[:, None, :]
        res = res * columns[:, None, :]
    log_columns = log_column_softmax(logits)
    res, divisor = first_iteration(log_columns, eps, N, NP, V4)
    grad = grad - tl.sum(grad * res, axis=2)[:, :, None]
    columns = tl.exp(log_columns)
    if V4:
        # res = logits.softmax(dim=-2) + eps; res = res / (res.sum(dim=-1) + eps)
        grad = grad / divisor[:, :, None]
        grad = columns * (grad - tl.sum(grad * columns, axis=1)[:, None, :])
    else:
        # res = logits.log_softmax(dim=-2).softmax(dim=-1)
        grad = grad * res
        grad = grad - columns * tl.sum(grad, axis=1)[:, None, :]
    return grad


@triton.jit
def permutation_matrix(matrices_ptr, index, N: tl.constexpr, NP: tl.constexpr):
    """P_k of the table [n!, n, n], [1, NP, NP]."""
    o, i = stream_index(NP)
    return tl.load(matrices_ptr + (index * N + o) * N + i, mask=(o < N) & (i < N), other=0.0)
