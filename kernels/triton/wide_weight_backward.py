"""The gradient of phi of many streams: weight_backward.py's first kernel, the other way round."""

import triton
import triton.language as tl

from mhc_megatron.kernels.triton.tile_math import dot


@triton.jit
def add_weight_product(
    product,
    factor,
    projected_ptr,
    first_row: tl.constexpr,
    tokens,
    live,
    T,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``product + factor @ grad_projected^T`` of ROWS rows, both parts."""
    rows = first_row + tl.arange(0, ROWS)
    for part in tl.static_range(PARTS):
        pointers = projected_ptr + (part * M + rows)[:, None] * T + tokens[None, :]
        projected = tl.load(pointers, mask=(rows < M)[:, None] & live[None, :], other=0.0)
        product = dot(factor, tl.trans(projected), product, PRECISION)
    return product


@triton.jit
def wide_weight_bwd(
    y_ptr,
    projected_ptr,
    partial_ptr,
    T,
    K: tl.constexpr,
    M: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``weight_bwd`` with phi's columns as the rows of a tensor core's product, of which its own 80
    would fill 64 and a quarter; they are HEAD and up to TAIL more columns of two products."""
    T = tl.cast(T, tl.int64)
    columns = tl.program_id(0) * BK + tl.arange(0, BK)
    split = tl.program_id(1)
    first = split.to(tl.int64) * SPLIT
    last = tl.minimum(first + SPLIT, T)
    head = tl.zeros([BK, HEAD], tl.float32)
    if TAIL > 0:
        tail = tl.zeros([BK, TAIL], tl.float32)
    for step in tl.range(0, SPLIT, BT, num_stages=STAGES):
        tokens = first + step + tl.arange(0, BT)
        live = tokens < last
        mask = live[:, None] & (columns < K)[None, :]
        y = tl.load(y_ptr + tokens[:, None] * K + columns[None, :], mask=mask, other=0.0)
        factor = tl.trans(y.to(projected_ptr.dtype.element_ty))
        head = add_weight_product(
            head, factor, projected_ptr, 0, tokens, live, T, M, HEAD, PARTS, PRECISION
        )
        if TAIL > 0:
            tail = add_weight_product(
                tail, factor, projected_ptr, HEAD, tokens, live, T, M, TAIL, PARTS, PRECISION
            )
    store_weight_columns(partial_ptr, split, head, 0, columns, K, M, HEAD)
    if TAIL > 0:
        store_weight_columns(partial_ptr, split, tail, HEAD, columns, K, M, TAIL)


@triton.jit
def store_weight_columns(
    partial_ptr,
    split,
    sums,
    first_row: tl.constexpr,
    columns,
    K: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
):
    """[BK, ROWS] into ``partial`` [splits, M, K]."""
    rows = first_row + tl.arange(0, ROWS)[None, :]
    pointers = partial_ptr + (split * M + rows) * K + columns[:, None]
    tl.store(pointers, sums, mask=(rows < M) & (columns < K)[:, None])
