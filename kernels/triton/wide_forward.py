"""Forward of many streams: after ``post_fwd``, products with phi that share a token's channels.

phi has n (n + 2) rows. A program that walks through all channels reads all of it, for as many
tokens as it can hold: of many streams, more of phi than of the streams. Here the products with phi
are a kernel of their own, whose programs have many tokens and a part of the channels, and what they
sum over them is added up by the kernel that reads the streams, read_forward.py.
"""

import triton
import triton.language as tl

from mhc_megatron.kernels.triton.forward import store_inverse_rms
from mhc_megatron.kernels.triton.tile_math import (
    channel_mask,
    dot,
    interleaved_place,
    lane_sums,
    load_streams,
    phi_pointers,
    span_of,
    token_rows,
)


@triton.jit
def add_product(
    product,
    factor,
    weight_ptr,
    first_row: tl.constexpr,
    columns,
    C: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``product + factor @ phi^T`` of ROWS rows of phi's parts, one below the other."""
    rows = first_row + tl.arange(0, ROWS)
    mask = (columns < N * C)[:, None] & (rows < PARTS * M)[None, :]
    if PARTS == 2:
        # Of ``split_wide``.
        columns = interleaved_place(columns // C, columns % C, N)
    pointers = phi_pointers(weight_ptr, rows[None, :], columns[:, None], M, N * C, PARTS == 2)
    return dot(factor, tl.load(pointers, mask=mask, other=0.0), product, PRECISION)


@triton.jit
def square_fwd(
    x_ptr,
    raw_ptr,
    T,
    rms_eps,
    C: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """1/RMS of BT tokens, in row M of ``raw``: of ``pre`` alone, as ``post_fwd`` sums it."""
    T = tl.cast(T, tl.int64)
    first, tokens, live = token_rows(T, BT)
    rows = x_ptr + first * (N * C) + tl.arange(0, BT)[:, None] * (N * C)
    squares = tl.zeros([BT, BC // VECTOR], tl.float32)
    for c in tl.range(0, C, BC, num_stages=STAGES):
        mask = channel_mask(live, c, C, BC)
        x = load_streams(rows, c, mask, N, C, BC, "")
        for i in tl.static_range(N):
            squares += lane_sums(x[i] * x[i], BT, BC, VECTOR)
    store_inverse_rms(raw_ptr + M * T, squares, tokens, live, rms_eps, N * C)


@triton.jit
def project_fwd(
    y_ptr,
    weight_ptr,
    sums_ptr,
    T,
    C: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    SPAN: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Products with phi of BT tokens and SPAN of their n * C numbers.

    ``weight``: phi, of ``split_wide`` where there are two PARTS; the M rows of each are, together,
    HEAD and up to TAIL more, of which each is a product. ``sums``: [programs, PARTS * M, BT],
    ``vec(y) phi`` by part.
    """
    K: tl.constexpr = N * C
    SPLITS: tl.constexpr = (K + SPAN - 1) // SPAN
    T = tl.cast(T, tl.int64)
    first, _, live = token_rows(T, BT, SPLITS)
    rows = tl.arange(0, BT)[:, None] * K
    y_ptr += first * K
    sums_ptr += tl.program_id(0).to(tl.int64) * (PARTS * M * BT)
    head = tl.zeros([BT, HEAD], tl.float32)
    if TAIL > 0:
        tail = tl.zeros([BT, TAIL], tl.float32)
    start, stop = span_of(K, SPAN)
    for k in tl.range(start, stop, BC, num_stages=STAGES):
        columns = k + tl.arange(0, BC)
        mask = channel_mask(live, k, K, BC)
        y = tl.load(y_ptr + rows + columns[None, :], mask=mask, other=0.0)
        # Nothing else asks for the tile: products take it from where it was loaded to.
        factor = y.to(weight_ptr.dtype.element_ty)
        head = add_product(head, factor, weight_ptr, 0, columns, C, N, M, HEAD, PARTS, PRECISION)
        if TAIL > 0:
            tail = add_product(
                tail, factor, weight_ptr, HEAD, columns, C, N, M, TAIL, PARTS, PRECISION
            )
    store_rows(sums_ptr, head, 0, PARTS * M, HEAD, BT)
    if TAIL > 0:
        store_rows(sums_ptr, tail, HEAD, PARTS * M, TAIL, BT)


@triton.jit
def store_rows(
    sums_ptr,
    sums,
    first_row: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    BT: tl.constexpr,
):
    """Of [BT, ROWS] those below LAST."""
    rows = first_row + tl.arange(0, ROWS)[None, :]
    tl.store(sums_ptr + rows * BT + tl.arange(0, BT)[:, None], sums, mask=rows < LAST)
