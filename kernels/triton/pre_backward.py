"""Backward of ``pre`` alone, second pass: the gradients of the streams and of phi, read once."""

import triton
import triton.language as tl

from mhc_megatron.kernels.triton.streams_backward import load_projected
from mhc_megatron.kernels.triton.tile_math import (
    channel_mask,
    dot,
    interleaved_place,
    load_radial,
    load_weight,
)
from mhc_megatron.kernels.triton.weight_backward import store_weight_sums


@triton.jit
def pre_bwd(
    grad_y_ptr,
    grad_u_ptr,
    x_ptr,
    packed_ptr,
    projected_ptr,
    radial_ptr,
    weight_ptr,
    grad_x_ptr,
    weight_partial_ptr,
    T,
    C: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_GRAD_Y: tl.constexpr,
    TRAINS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SPLIT: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Of SPLIT tokens and BC channels of one stream, and with TRAINS of phi's columns there.

    Nothing is summed over channels here, so a program keeps its columns of phi for all its tokens.
    ``weight`` is phi, [PARTS, M, K], INTERLEAVED as in ``streams_bwd``; ``weight_partial``:
    [splits, M, K] float32.
    """
    T = tl.cast(T, tl.int64)
    K: tl.constexpr = N * C
    # Neighbours share the gradient of u, and find it in L2.
    stream = tl.program_id(0) % N
    c = tl.program_id(0) // N * BC
    split = tl.program_id(1).to(tl.int64)
    first = split * SPLIT
    last = tl.minimum(first + SPLIT, T)
    channels = c + tl.arange(0, BC)
    present = channels < C
    columns = stream * C + channels
    rows = tl.arange(0, BT)[:, None]
    places = rows * K + columns[None, :]

    phi_columns = interleaved_place(stream, channels, N) if INTERLEAVED else columns
    phi_rows = weight_ptr + tl.arange(0, MP)[:, None] * K
    phi_live = tl.arange(0, MP) < M
    weight = load_weight(phi_rows, phi_columns, present, phi_live)
    weight_low = weight
    if TERMS == 3:
        weight_low = load_weight(phi_rows + M * K, phi_columns, present, phi_live)
    m = tl.arange(0, PARTS * ROWS) % ROWS
    parts = tl.arange(0, PARTS * ROWS) // ROWS
    sums = tl.zeros([PARTS * ROWS, BC], tl.float32)
    for step in tl.range(0, tl.cast(last - first, tl.int32), BT, num_stages=STAGES):
        start = first + step
        tokens = start + tl.arange(0, BT)
        live = tokens < last
        mask = channel_mask(live, c, C, BC)
        x = tl.load(x_ptr + start * K + places, mask=mask, other=0.0)
        u_pointers = grad_u_ptr + start * C + rows * C + channels[None, :]
        grad_u = tl.load(u_pointers, mask=mask, other=0.0).to(tl.float32)
        read = tl.load(packed_ptr + stream * T + tokens, mask=live, other=0.0)
        radial = load_radial(radial_ptr, tokens, live, T, False)
        grad = tl.zeros([BT, BC], tl.float32)
        if HAS_GRAD_Y:
            grad = tl.load(grad_y_ptr + start * K + places, mask=mask, other=0.0).to(tl.float32)
        # three uses of x: raw's product with phi, its division by the RMS, and the read
        grad += radial[:, None] * x.to(tl.float32) + read[:, None] * grad_u
        high = load_projected(projected_ptr, 0, tokens, live, T, M, MP)
        product = dot(high, weight, tl.zeros([BT, BC], tl.float32), PRECISION)
        if TERMS >= 2:
            low = load_projected(projected_ptr, 1, tokens, live, T, M, MP)
            product = dot(low, weight, product, PRECISION)
        if TERMS == 3:
            product = dot(high, weight_low, product, PRECISION)
        grad_x = (grad + product).to(grad_x_ptr.dtype.element_ty)
        tl.store(grad_x_ptr + start * K + places, grad_x, mask=mask)
        if TRAINS:
            # grad_phi = grad_projected^T vec(x)
            pointers = projected_ptr + (parts * M + m)[:, None] * T + tokens[None, :]
            projected = tl.load(pointers, mask=(m < M)[:, None] & live[None, :], other=0.0)
            # Added in its own iteration, the product ends before the next load writes where it
            # reads x. Of a tile that registers take as well as a product that runs beside the rest
            # of its loop Triton (3.6, 3.7) keeps one place too few, and results differ from run to
            # run; ``tests/helpers/compile_kernels.py`` looks for that. Rows beyond M are zeros
            # anyway: without a selection the compiler makes of the addition a product that runs on.
            factor = x.to(projected_ptr.dtype.element_ty)
            product = dot(projected, factor, tl.zeros([PARTS * ROWS, BC], tl.float32), PRECISION)
            sums += tl.where((m < M)[:, None], product, 0.0)
    if TRAINS:
        store_weight_sums(weight_partial_ptr, split, sums, columns, present, K, M, ROWS, PARTS, BC)
