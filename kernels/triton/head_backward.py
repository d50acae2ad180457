"""Backward of the learned contraction: coefficients, then streams and phi in one pass, then sums.

The gradients of the weights need a whole token, the gradient of phi many tokens: the first pass has
programs of tokens, the second of channels.
"""

import triton
import triton.language as tl

from mhc_megatron.kernels.triton.tile_math import (
    channel_mask,
    dot,
    lane_sums,
    load_coefficients,
    load_streams,
    token_rows,
    widened,
    zero_sums,
)


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
def learned_weights_bwd(
    x_ptr,
    grad_ptr,
    raw_ptr,
    scale_ptr,
    bias_ptr,
    coefficients_ptr,
    partial_ptr,
    T,
    eps,
    C: tl.constexpr,
    N: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What the gradient of a token's streams takes, and sums of BT tokens for bias and scale.

    ``coefficients``: [2n + 1, T]: the n weights, the gradient of ``vec(x) phi``, and the factor
    with which the streams themselves enter, through the RMS. ``partial``: [n + 1, programs].
    """
    T = tl.cast(T, tl.int64)
    first, tokens, live = token_rows(T, BT)
    K: tl.constexpr = N * C
    x_rows = x_ptr + first * K + tl.arange(0, BT)[:, None] * K
    grad_rows = grad_ptr + first * C + tl.arange(0, BT)[:, None] * C
    sums = zero_sums(N, BT, BC // VECTOR)
    for c in tl.range(0, C, BC, num_stages=STAGES):
        mask = channel_mask(live, c, C, BC)
        x = load_streams(x_rows, c, mask, N, C, BC, "")
        pointers = grad_rows + (c + tl.arange(0, BC))[None, :]
        grad = widened(tl.load(pointers, mask=mask, other=0.0))
        # h = sum_i w[i] x[i]: grad_w[i] = sum_c grad_h x[i]
        added = ()
        for i in tl.static_range(N):
            added = added + (sums[i] + lane_sums(grad * x[i], BT, BC, VECTOR),)
        sums = added

    scale = tl.load(scale_ptr)
    inverse_rms = tl.load(raw_ptr + N * T + tokens, mask=live, other=0.0)
    radial = tl.zeros([BT], tl.float32)
    grad_scale = tl.zeros([BT], tl.float32)
    for i in tl.static_range(N):
        # 0 where there is no token, as the sums are
        raw = tl.load(raw_ptr + i * T + tokens, mask=live, other=0.0)
        sigmoid = tl.sigmoid(scale * raw + tl.load(bias_ptr + i))
        grad_logit = tl.sum(sums[i], axis=1) * sigmoid * (1.0 - sigmoid)
        grad_raw = scale * grad_logit
        grad_scale += grad_logit * raw
        radial += grad_raw * raw
        tl.store(coefficients_ptr + i * T + tokens, sigmoid + eps, mask=live)
        tl.store(coefficients_ptr + (N + i) * T + tokens, grad_raw * inverse_rms, mask=live)
        bias_sum = tl.sum(grad_logit, axis=0)
        tl.store(partial_ptr + i * tl.num_programs(0) + tl.program_id(0), bias_sum)
    # raw = proj / rms, rms^2 = mean(x^2) + eps: grad x += -(grad_raw . raw) / (K rms^2) x
    radial = -radial * inverse_rms * inverse_rms / K
    tl.store(coefficients_ptr + 2 * N * T + tokens, radial, mask=live)
    scale_sum = tl.sum(grad_scale, axis=0)
    tl.store(partial_ptr + N * tl.num_programs(0) + tl.program_id(0), scale_sum)


@triton.jit
def learned_streams_bwd(
    x_ptr,
    grad_ptr,
    weight_ptr,
    coefficients_ptr,
    grad_x_ptr,
    weight_partial_ptr,
    T,
    C: tl.constexpr,
    N: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    TRAINS: tl.constexpr,
    SPLIT: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of the streams, and with TRAINS of phi, of SPLIT tokens and BC channels.

    ``weight_partial``: [splits, n, K] float32.
    """
    T = tl.cast(T, tl.int64)
    c = tl.program_id(0) * BC
    split = tl.program_id(1).to(tl.int64)
    first = split * SPLIT
    last = tl.minimum(first + SPLIT, T)
    K: tl.constexpr = N * C
    PART: tl.constexpr = 16 // PARTS
    columns = (c + tl.arange(0, BC))[None, :]
    rows = tl.arange(0, BT)[:, None]
    # phi is high, low, high, low; what it is multiplied with is high, high, low, low.
    DEPTH: tl.constexpr = 16 * PARTS
    across = tl.arange(0, DEPTH)[None, :]
    below = tl.arange(0, 16)[:, None]
    weights = ()
    for i in tl.static_range(N):
        weights = weights + (load_head(weight_ptr, i, c, C, N, PARTS, DEPTH, BC),)
    sums = zero_sums(N, 16, BC)
    for step in tl.range(0, tl.cast(last - first, tl.int32), BT, num_stages=STAGES):
        start = first + step
        tokens = start + tl.arange(0, BT)
        live = tokens < last
        mask = channel_mask(live, c, C, BC)
        x = load_streams(x_ptr + start * K + rows * K, c, mask, N, C, BC, "")
        grad = tl.load(grad_ptr + start * C + rows * C + columns, mask=mask, other=0.0)
        grad = widened(grad)
        read = load_coefficients(coefficients_ptr, 0, tokens, live, T, N)
        radial = tl.load(coefficients_ptr + 2 * N * T + tokens, mask=live, other=0.0)
        pointers = coefficients_ptr + (N + across % PART) * T + tokens[:, None]
        present = live[:, None] & (across % PART < N)
        projected = tl.load(pointers, mask=present, other=0.0)
        projected = part_of(projected, across >= 16, PARTS)
        if TRAINS:
            pointers = coefficients_ptr + (N + below % PART) * T + tokens[None, :]
            present = live[None, :] & (below % PART < N)
            transposed = tl.load(pointers, mask=present, other=0.0)
            transposed = part_of(transposed, below >= PART, PARTS)
            added = ()
        for i in tl.static_range(N):
            grad_x = read[i][:, None] * grad + radial[:, None] * x[i]
            grad_x = dot(projected, weights[i], grad_x, PRECISION)
            pointers = grad_x_ptr + start * K + rows * K + i * C + columns
            tl.store(pointers, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
            if TRAINS:
                factor = x[i].to(tl.bfloat16) if PARTS == 2 else x[i]
                added = added + (dot(transposed, factor, sums[i], PRECISION),)
        if TRAINS:
            sums = added
    if TRAINS:
        m = tl.arange(0, PART)[:, None]
        for i in tl.static_range(N):
            total = tl.sum(tl.reshape(sums[i], [PARTS, PART, BC]), axis=0)
            pointers = weight_partial_ptr + (split * N + m) * K + i * C + columns
            tl.store(pointers, total, mask=(m < N) & (columns < C))


@triton.jit
def reduce_head(
    weight_partial_ptr,
    partial_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    grad_scale_ptr,
    splits,
    programs,
    SIZE: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A number of bias [n] or scale [1] per program, then BLOCK of phi; in a fixed order."""
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    if program <= N:
        row = partial_ptr + program.to(tl.int64) * programs
        for step in range(0, programs, BLOCK):
            total += tl.load(row + step + lanes, mask=step + lanes < programs, other=0.0)
        target = grad_bias_ptr + program if program < N else grad_scale_ptr
        tl.store(target, tl.sum(total, axis=0))
    else:
        offsets = (program - N - 1).to(tl.int64) * BLOCK + lanes
        mask = offsets < SIZE
        for split in range(0, splits):
            pointers = weight_partial_ptr + tl.cast(split, tl.int64) * SIZE + offsets
            total += tl.load(pointers, mask=mask, other=0.0)
        tl.store(grad_weight_ptr + offsets, total, mask=mask)
