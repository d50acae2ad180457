"""Forward of many streams: two kernels, so that programs can share a token's channels.

phi has n (n + 2) rows. A program that walks through all channels reads all of it, for as many
tokens as it can hold: of many streams, more of phi than of the streams. Here a program has many
tokens and a part of the channels, and what it sums over them is added up by the kernel that reads
the streams.
"""

import triton
import triton.language as tl

from mhc_megatron.kernels.triton.forward import write_read
from mhc_megatron.kernels.triton.tile_math import (
    channel_mask,
    dot,
    gather_coefficients,
    gathered,
    interleave,
    load_branch,
    load_streams,
    narrowed,
    phi_pointers,
    post_mix_row,
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
    M: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    LAST: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``product + factor @ phi^T`` of ROWS rows of phi and the columns below LAST, both parts."""
    rows = first_row + tl.arange(0, ROWS)
    mask = (columns < LAST)[:, None] & (rows < M)[None, :]
    pointers = phi_pointers(weight_ptr, rows[None, :], columns[:, None], M, K, PARTS == 2)
    weight = tl.load(pointers, mask=mask, other=0.0)
    product = dot(factor, weight, product, PRECISION)
    if PARTS == 2:
        weight = tl.load(pointers + M, mask=mask, other=0.0)
        product = dot(factor, weight, product, PRECISION)
    return product


@triton.jit
def next_streams(
    x, branch, coefficients_ptr, dtype: tl.constexpr, N: tl.constexpr, BT: tl.constexpr
):
    """``x'[o] = sum_i H_res[o, i] x[i] + H_post[o] f``, rounded to the streams' dtype."""
    ys = ()
    for o in tl.static_range(N):
        res = ()
        for i in tl.static_range(N):
            res = res + (gathered(coefficients_ptr, (2 + o) * N + i, BT),)
        y = post_mix_row(x, branch, gathered(coefficients_ptr, N + o, BT), res, N)
        ys = ys + (y.to(dtype),)
    return ys


@triton.jit
def project_fwd(
    x_ptr,
    branch_ptr,
    branch_bias_ptr,
    packed_ptr,
    weight_ptr,
    y_ptr,
    u_ptr,
    sums_ptr,
    T,
    C: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_POST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SINGLE_PASS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SPAN: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y of BT tokens and SPAN channels, and its products with phi; without HAS_POST y is x.

    ``weight``: phi, of ``split_wide`` where INTERLEAVED; its M rows are HEAD and up to TAIL more,
    of which each is a product. ``sums``: [programs, ROWS, BT], ``vec(y) phi`` and the sum of
    squares of a program's channels; until they are known, the program's coefficients.
    """
    SPLITS: tl.constexpr = (C + SPAN - 1) // SPAN
    T = tl.cast(T, tl.int64)
    first, tokens, live = token_rows(T, BT, SPLITS)
    K: tl.constexpr = N * C
    rows = tl.arange(0, BT)[:, None] * K
    branch_rows = tl.arange(0, BT)[:, None] * C
    x_ptr += first * K
    y_ptr += first * K
    u_ptr += first * C
    sums_ptr += tl.program_id(0).to(tl.int64) * (ROWS * BT)
    if HAS_POST:
        branch_ptr += first * C
        gather_coefficients(sums_ptr, packed_ptr, 0, tokens, live, T, N * (N + 2), BT)
        # Other threads than wrote them read them.
        tl.debug_barrier()

    head = tl.zeros([BT, HEAD], tl.float32)
    if TAIL > 0:
        tail = tl.zeros([BT, TAIL], tl.float32)
    squares = tl.zeros([BT, BC], tl.float32)
    X_EVICTION: tl.constexpr = "evict_first" if HAS_POST or SINGLE_PASS else ""
    start, stop = span_of(C, SPAN)
    for c in tl.range(start, stop, BC, num_stages=STAGES):
        mask = channel_mask(live, c, C, BC)
        channels = c + tl.arange(0, BC)
        x = load_streams(x_ptr + rows, c, mask, N, C, BC, X_EVICTION)
        if HAS_POST:
            branch = load_branch(
                branch_ptr + branch_rows, branch_bias_ptr, c, mask, HAS_BIAS, C, BC
            )
        if SINGLE_PASS:
            u = tl.zeros([BT, BC], tl.float32)
        ys = narrowed(x, x_ptr.dtype.element_ty, N)
        if HAS_POST:
            # Always true. Loads in a branch are not loaded ahead, which pays only for the streams.
            if T > 0:
                ys = next_streams(x, branch, sums_ptr, x_ptr.dtype.element_ty, N, BT)
            for o in tl.static_range(N):
                y_pointers = y_ptr + rows + (o * C + channels)[None, :]
                tl.store(y_pointers, ys[o], mask=mask)
        for o in tl.static_range(N):
            # vec(x) phi and mean(vec(x)^2)
            wide = ys[o].to(tl.float32)
            squares += wide * wide
            if not INTERLEAVED:
                columns, factor = o * C + channels, ys[o].to(weight_ptr.dtype.element_ty)
                head = add_product(
                    head, factor, weight_ptr, 0, columns, M, K, HEAD, (o + 1) * C, PARTS, PRECISION
                )
                if TAIL > 0:
                    tail = add_product(
                        tail,
                        factor,
                        weight_ptr,
                        HEAD,
                        columns,
                        M,
                        K,
                        TAIL,
                        (o + 1) * C,
                        PARTS,
                        PRECISION,
                    )
            if SINGLE_PASS:
                u = tl.fma(gathered(sums_ptr, o, BT)[:, None], wide, u)
        if INTERLEAVED:
            columns, factor = c * N + tl.arange(0, N * BC), interleave(ys, N, BT, BC)
            head = add_product(
                head, factor, weight_ptr, 0, columns, M, K, HEAD, K, PARTS, PRECISION
            )
            if TAIL > 0:
                tail = add_product(
                    tail, factor, weight_ptr, HEAD, columns, M, K, TAIL, K, PARTS, PRECISION
                )
        if SINGLE_PASS:
            u_pointers = u_ptr + branch_rows + channels[None, :]
            tl.store(u_pointers, u.to(u_ptr.dtype.element_ty), mask=mask)

    # All threads have read the coefficients.
    tl.debug_barrier()
    store_rows(sums_ptr, head, 0, M, HEAD, BT)
    if TAIL > 0:
        store_rows(sums_ptr, tail, HEAD, M, TAIL, BT)
    tl.store(sums_ptr + M * BT + tl.arange(0, BT), tl.sum(squares, axis=1))


@triton.jit
def store_rows(
    sums_ptr,
    sums,
    first_row: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    BT: tl.constexpr,
):
    """Of [BT, ROWS] those below M."""
    rows = first_row + tl.arange(0, ROWS)[None, :]
    tl.store(sums_ptr + rows * BT + tl.arange(0, BT)[:, None], sums, mask=rows < M)


@triton.jit
def read_fwd(
    y_ptr,
    sums_ptr,
    alpha_pre_ptr,
    alpha_post_ptr,
    alpha_res_ptr,
    bias_ptr,
    matrices_ptr,
    u_ptr,
    raw_ptr,
    next_packed_ptr,
    norm_weight_ptr,
    norm_inverse_rms_ptr,
    T,
    rms_eps,
    eps,
    norm_eps,
    C: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    NN: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    ROWS: tl.constexpr,
    PROJECTION: tl.constexpr,
    ITERATIONS: tl.constexpr,
    SINGLE_PASS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Raw logits, mappings, and unless SINGLE_PASS u of BT tokens.

    ``sums``: of ``project_fwd`` in tiles of TILE tokens, of SPLITS programs each.
    """
    T = tl.cast(T, tl.int64)
    # The last tokens first: what was written last is still in L2.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BT
    tokens = first + tl.arange(0, BT)
    live = tokens < T
    rows = tl.arange(0, MP)[:, None]
    squares = tl.zeros([BT], tl.float32)
    raw = tl.zeros([MP, BT], tl.float32)
    for split in tl.static_range(SPLITS):
        block = sums_ptr + (tokens // TILE * SPLITS + split) * (ROWS * TILE) + tokens % TILE
        squares += tl.load(block + M * TILE, mask=live, other=0.0)
        raw += tl.load(block[None, :] + rows * TILE, mask=(rows < M) & live[None, :], other=0.0)
    inverse_rms = tl.rsqrt(squares / (N * C) + rms_eps)
    tl.store(raw_ptr + M * T + tokens, inverse_rms, mask=live)
    write_read(
        raw,
        inverse_rms,
        alpha_pre_ptr,
        alpha_post_ptr,
        alpha_res_ptr,
        bias_ptr,
        matrices_ptr,
        y_ptr + first * (N * C),
        tl.arange(0, BT)[:, None] * (N * C),
        u_ptr + first * C,
        tl.arange(0, BT)[:, None] * C,
        raw_ptr,
        next_packed_ptr,
        norm_weight_ptr,
        norm_inverse_rms_ptr,
        tokens,
        live,
        T,
        eps,
        norm_eps,
        C,
        N,
        NP,
        NN,
        M,
        MP,
        PROJECTION,
        ITERATIONS,
        SINGLE_PASS,
        HAS_NORM,
        BT,
        BC,
        STAGES,
    )
