"""Into the n streams and out of them again: copies, plain sums, and the learned contraction.

Each backward of ``expand`` and of the plain contractions is the other one's forward.
"""

import triton
import triton.language as tl

from mhc_megatron.kernels.triton.tile_math import (
    channel_mask,
    load_streams,
    token_rows,
    zero_sums,
)


@triton.jit
def expand_fwd(
    hidden_ptr,
    streams_ptr,
    T,
    C: tl.constexpr,
    N: tl.constexpr,
    DIVISOR: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """``x[i] = h / DIVISOR`` of BT tokens and BC channels."""
    T = tl.cast(T, tl.int64)
    first, _, live = token_rows(T, BT)
    c = tl.program_id(1) * BC
    mask = channel_mask(live, c, C, BC)
    rows = tl.arange(0, BT)[:, None]
    columns = (c + tl.arange(0, BC))[None, :]
    hidden = tl.load(hidden_ptr + first * C + rows * C + columns, mask=mask)
    if DIVISOR != 1:
        wide = hidden.to(tl.float32)
        hidden = tl.div_rn(wide, tl.full([BT, BC], DIVISOR, tl.float32))
        hidden = hidden.to(streams_ptr.dtype.element_ty)
    streams_ptr += first * (N * C)
    for i in tl.static_range(N):
        tl.store(streams_ptr + rows * (N * C) + i * C + columns, hidden, mask=mask)


@triton.jit
def contract_fwd(
    streams_ptr,
    hidden_ptr,
    T,
    C: tl.constexpr,
    N: tl.constexpr,
    DIVISOR: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """``h = (x[0] + ... + x[n - 1]) / DIVISOR`` in float32, in that order."""
    T = tl.cast(T, tl.int64)
    first, _, live = token_rows(T, BT)
    c = tl.program_id(1) * BC
    mask = channel_mask(live, c, C, BC)
    rows = tl.arange(0, BT)[:, None]
    streams = load_streams(streams_ptr + first * (N * C) + rows * (N * C), c, mask, N, C, BC, "")
    total = streams[0]
    for i in tl.static_range(1, N):
        total += streams[i]
    if DIVISOR != 1:
        total = tl.div_rn(total, tl.full([BT, BC], DIVISOR, tl.float32))
    pointers = hidden_ptr + first * C + rows * C + (c + tl.arange(0, BC))[None, :]
    tl.store(pointers, total.to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def learned_fwd(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    hidden_ptr,
    raw_ptr,
    T,
    rms_eps,
    eps,
    C: tl.constexpr,
    N: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``h = sum_i (sigmoid(scale raw[i] + bias[i]) + eps) x[i]`` of BT tokens.

    ``raw``: [n + 1, T], the projection over the RMS, then 1/RMS. phi has too few rows to be worth
    tensor cores, whose factors would have to be brought into another order first.
    """
    T = tl.cast(T, tl.int64)
    first, tokens, live = token_rows(T, BT)
    K: tl.constexpr = N * C
    x_rows = x_ptr + first * K + tl.arange(0, BT)[:, None] * K
    projected = zero_sums(N, BT, BC)
    squares = tl.zeros([BT, BC], tl.float32)
    for c in tl.range(0, C, BC, num_stages=STAGES):
        mask = channel_mask(live, c, C, BC)
        x = load_streams(x_rows, c, mask, N, C, BC, "evict_last")
        columns = c + tl.arange(0, BC)
        for i in tl.static_range(N):
            squares += x[i] * x[i]
        sums = ()
        for row in tl.static_range(N):
            total = projected[row]
            for i in tl.static_range(N):
                pointers = weight_ptr + row * K + i * C + columns
                weight = tl.load(pointers, mask=columns < C, other=0.0)
                total += x[i] * weight[None, :]
            sums = sums + (total,)
        projected = sums

    # raw = vec(x) phi / sqrt(mean(vec(x)^2) + eps)
    inverse_rms = tl.rsqrt(tl.sum(squares, axis=1) / K + rms_eps)
    tl.store(raw_ptr + N * T + tokens, inverse_rms, mask=live)
    scale = tl.load(scale_ptr)
    read = ()
    for i in tl.static_range(N):
        raw = tl.sum(projected[i], axis=1) * inverse_rms
        tl.store(raw_ptr + i * T + tokens, raw, mask=live)
        read = read + (tl.sigmoid(scale * raw + tl.load(bias_ptr + i)) + eps,)

    hidden_rows = hidden_ptr + first * C + tl.arange(0, BT)[:, None] * C
    # From the last chunk to the first: what was read last is still in L2.
    CHUNKS: tl.constexpr = (C + BC - 1) // BC
    for chunk in tl.range(0, CHUNKS, num_stages=STAGES):
        c = (CHUNKS - 1 - chunk) * BC
        mask = channel_mask(live, c, C, BC)
        x = load_streams(x_rows, c, mask, N, C, BC, "evict_first")
        hidden = read[0][:, None] * x[0]
        for i in tl.static_range(1, N):
            hidden += read[i][:, None] * x[i]
        pointers = hidden_rows + (c + tl.arange(0, BC))[None, :]
        tl.store(pointers, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)
