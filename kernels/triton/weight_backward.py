"""Gradients of phi, alpha, bias and a norm: partial sums, then their sum in a fixed order."""

import triton
import triton.language as tl

from mhc_megatron.kernels.triton.tile_math import dot


@triton.jit
def store_weight_sums(
    partial_ptr,
    split,
    accumulator,
    columns,
    present,
    K: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The parts of a sum [PARTS * MP, WIDTH] together, into ``partial`` [splits, M, K]."""
    grad = tl.sum(tl.reshape(accumulator, [PARTS, MP, WIDTH]), axis=0)
    rows = tl.arange(0, MP)[:, None]
    pointers = partial_ptr + (split * M + rows) * K + columns[None, :]
    tl.store(pointers, grad, mask=(rows < M) & present[None, :])


@triton.jit
def weight_bwd(
    y_ptr,
    projected_ptr,
    partial_ptr,
    T,
    K: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``grad_phi = grad_projected^T vec(y)`` of SPLIT tokens and BK columns.

    ``partial``: [splits, M, K] float32.
    """
    T = tl.cast(T, tl.int64)
    columns = tl.program_id(0) * BK + tl.arange(0, BK)
    split = tl.program_id(1)
    first = split.to(tl.int64) * SPLIT
    last = tl.minimum(first + SPLIT, T)
    m = tl.arange(0, PARTS * MP) % MP
    projected_rows = projected_ptr + ((tl.arange(0, PARTS * MP) // MP) * M + m)[:, None] * T
    accumulator = tl.zeros([PARTS * MP, BK], tl.float32)
    for step in tl.range(0, SPLIT, BT, num_stages=STAGES):
        tokens = first + step + tl.arange(0, BT)
        projected = tl.load(
            projected_rows + tokens[None, :],
            mask=(m < M)[:, None] & (tokens < last)[None, :],
            other=0.0,
        )
        y = tl.load(
            y_ptr + tokens[:, None] * K + columns[None, :],
            mask=(tokens < last)[:, None] & (columns < K)[None, :],
            other=0.0,
        )
        y = y.to(projected_ptr.dtype.element_ty)
        accumulator = dot(projected, y, accumulator, PRECISION)
    store_weight_sums(partial_ptr, split, accumulator, columns, columns < K, K, M, MP, PARTS, BK)


@triton.jit
def sum_norm_partials(
    norm_partial_ptr, grad_norm_ptr, block, programs, C: tl.constexpr, COLUMNS: tl.constexpr
):
    """COLUMNS numbers of a norm's weight, from ``norm_partial`` [programs, C]."""
    rows, columns = tl.arange(0, 32), block * COLUMNS + tl.arange(0, COLUMNS)
    live = columns < C
    total = tl.zeros([32, COLUMNS], tl.float32)
    for step in range(0, programs, 32):
        pointers = norm_partial_ptr + (step + rows)[:, None].to(tl.int64) * C + columns[None, :]
        mask = (step + rows < programs)[:, None] & live[None, :]
        total += tl.load(pointers, mask=mask, other=0.0)
    result = tl.sum(total, axis=0).to(grad_norm_ptr.dtype.element_ty)
    tl.store(grad_norm_ptr + columns, result, mask=live)


@triton.jit
def reduce_partials(
    weight_partial_ptr,
    partial_ptr,
    norm_partial_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    grad_alpha_ptr,
    grad_norm_ptr,
    programs,
    later_programs,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORM_PROGRAMS: tl.constexpr,
    NORM_COLUMNS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """A number of bias [M] per program, then one of alpha [3], then NORM_COLUMNS numbers of the
    norm's weight [C], then BLOCK numbers of phi.

    ``partial``: [2 M, programs], and ``norm_partial``: [programs, C], of ``mix_bwd``. In rows of
    H_post and H_res only ``later_programs`` columns are written. ACCUMULATE adds phi's to what is
    there.
    """
    program = tl.program_id(0)
    if program < M + 3:
        first, count = program, 1
        if program >= M:
            # logits = alpha * raw: the three gates share M products
            gate = program - M
            first = M + gate * N
            count = tl.where(gate < 2, N, M - 2 * N)
        written = tl.where(first % M < N, programs, later_programs)
        rows = tl.arange(0, ROWS)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for step in range(0, written, COLUMNS):
            columns = step + tl.arange(0, COLUMNS)
            pointers = partial_ptr + (first + rows)[:, None].to(tl.int64) * programs + columns
            mask = (rows < count)[:, None] & (columns < written)[None, :]
            total += tl.load(pointers, mask=mask, other=0.0)
        result = tl.sum(tl.sum(total, axis=1), axis=0)
        target = grad_bias_ptr + program if program < M else grad_alpha_ptr + (program - M)
        tl.store(target, result)
    elif program < M + 3 + NORM_PROGRAMS:
        if NORM_PROGRAMS > 0:
            block = program - M - 3
            sum_norm_partials(norm_partial_ptr, grad_norm_ptr, block, programs, C, NORM_COLUMNS)
    else:
        offsets = (program - M - 3 - NORM_PROGRAMS).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < SIZE
        grad = tl.zeros([BLOCK], tl.float32)
        for split in tl.static_range(SPLITS):
            grad += tl.load(weight_partial_ptr + split * SIZE + offsets, mask=mask, other=0.0)
        if ACCUMULATE:
            grad += tl.load(grad_weight_ptr + offsets, mask=mask, other=0.0)
        tl.store(grad_weight_ptr + offsets, grad, mask=mask)
