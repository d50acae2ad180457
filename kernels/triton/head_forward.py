"""Into the n streams and out of them again: copies, plain sums, and the learned contraction.

Each backward of ``expand`` and of the plain contractions is the other one's forward.
"""

import triton
import triton.language as tl

from mhc_megatron.kernels.triton.tile_math import (
    channel_mask,
    dot,
    interleave,
    load_streams,
    token_rows,
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
def part_of(value, low, PARTS: tl.constexpr):
    """float32 numbers as factors of a product: bfloat16, the low part where ``low``; or as is.

    High and low part together have 16 bits of mantissa, and their products with bfloat16 numbers
    are exact in float32.
    """
    if PARTS == 2:
        high = value.to(tl.bfloat16).to(tl.float32)
        value = tl.where(low, value - high, high).to(tl.bfloat16)
    return value


@triton.jit
def load_head(
    weight_ptr,
    stream,
    c,
    C: tl.constexpr,
    N: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BC: tl.constexpr,
):
    """phi's BC columns of one stream, [ROWS, BC]: high part, low part, and so on.

    Each part is n rows and as many zeros as make it 16 / PARTS.
    """
    PART: tl.constexpr = 16 // PARTS
    rows = tl.arange(0, ROWS)[:, None]
    columns = (c + tl.arange(0, BC))[None, :]
    pointers = weight_ptr + (rows % PART) * (N * C) + stream * C + columns
    weight = tl.load(pointers, mask=(rows % PART < N) & (columns < C), other=0.0)
    return part_of(weight, rows // PART % 2 == 1, PARTS)


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
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``h = sum_i (sigmoid(scale raw[i] + bias[i]) + eps) x[i]`` of BT tokens.

    ``raw``: [n + 1, T], the projection over the RMS, then 1/RMS. INTERLEAVED, a chunk of channels
    of all streams is one product.
    """
    T = tl.cast(T, tl.int64)
    first, tokens, live = token_rows(T, BT)
    K: tl.constexpr = N * C
    PART: tl.constexpr = 16 // PARTS
    x_rows = x_ptr + first * K + tl.arange(0, BT)[:, None] * K
    projected = tl.zeros([16, BT], tl.float32)
    squares = tl.zeros([BT, BC], tl.float32)
    for c in tl.range(0, C, BC, num_stages=STAGES):
        mask = channel_mask(live, c, C, BC)
        x = load_streams(x_rows, c, mask, N, C, BC, "evict_last")
        factors = ()
        weights = ()
        for i in tl.static_range(N):
            squares += x[i] * x[i]
            # The conversion back is exact: the factor is what was loaded.
            factor = x[i].to(tl.bfloat16) if PARTS == 2 else x[i]
            weight = load_head(weight_ptr, i, c, C, N, PARTS, 16, BC)
            if INTERLEAVED:
                factors = factors + (factor,)
                weights = weights + (weight,)
            else:
                projected = dot(weight, tl.trans(factor), projected, PRECISION)
        if INTERLEAVED:
            joined = tl.trans(interleave(factors, N, BT, BC))
            projected = dot(interleave(weights, N, 16, BC), joined, projected, PRECISION)

    # raw = vec(x) phi / sqrt(mean(vec(x)^2) + eps)
    inverse_rms = tl.rsqrt(tl.sum(squares, axis=1) / K + rms_eps)
    tl.store(raw_ptr + N * T + tokens, inverse_rms, mask=live)
    rows = tl.arange(0, PART)[:, None]
    summed = tl.sum(tl.reshape(projected, [PARTS, PART, BT]), axis=0)
    scale = tl.load(scale_ptr)
    read = ()
    for i in tl.static_range(N):
        raw = tl.sum(tl.where(rows == i, summed, 0.0), axis=0) * inverse_rms
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
