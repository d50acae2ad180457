"""Forward of many streams: after ``post_fwd``, two kernels that share a token's channels.

phi has n (n + 2) rows. A program that walks through all channels reads all of it, for as many
tokens as it can hold: of many streams, more of phi than of the streams. Here the products with phi
are a kernel of their own, whose programs have many tokens and a part of the channels, and what they
sum over them is added up by the kernel that reads the streams.
"""

import triton
import triton.language as tl

from mhc_megatron.kernels.triton.coefficients import write_later, write_pre
from mhc_megatron.kernels.triton.forward import mix_input, store_inverse_rms, write_raw
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
    eps,
    norm_eps,
    C: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    NN: tl.constexpr,
    M: tl.constexpr,
    LATER: tl.constexpr,
    PARTS: tl.constexpr,
    PROJECTION: tl.constexpr,
    ITERATIONS: tl.constexpr,
    READS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    COUNT: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Raw logits and mappings, and if it READS u; 1/RMS is in row M of ``raw``.

    The first programs have COUNT tokens each, H_post and H_res, whose iterations wait for each
    other; the others BT tokens, H_pre and u, and wait for memory. Without READS there are only the
    first, which have all mappings.

    ``sums``: of ``project_fwd`` in tiles of TILE tokens, of SPLITS programs each. LATER: a power of
    two for the first programs' rows.
    """
    T = tl.cast(T, tl.int64)
    program = tl.program_id(0)
    programs = tl.cast(tl.cdiv(T, COUNT), tl.int32)
    if program < programs:
        later_fwd(
            program.to(tl.int64) * COUNT + tl.arange(0, COUNT),
            sums_ptr,
            alpha_pre_ptr,
            alpha_post_ptr,
            alpha_res_ptr,
            bias_ptr,
            matrices_ptr,
            raw_ptr,
            next_packed_ptr,
            T,
            eps,
            N,
            NP,
            NN,
            M,
            LATER,
            PARTS,
            PROJECTION,
            ITERATIONS,
            READS,
            SPLITS,
            TILE,
            COUNT,
        )
    elif READS:
        # The last tokens first: what was written last is still in L2.
        input_fwd(
            (tl.num_programs(0) - 1 - program).to(tl.int64) * BT,
            y_ptr,
            sums_ptr,
            alpha_pre_ptr,
            bias_ptr,
            u_ptr,
            raw_ptr,
            next_packed_ptr,
            norm_weight_ptr,
            norm_inverse_rms_ptr,
            T,
            eps,
            norm_eps,
            C,
            N,
            NP,
            M,
            PARTS,
            PROJECTION,
            HAS_NORM,
            SPLITS,
            TILE,
            BT,
            BC,
            STAGES,
        )


@triton.jit
def later_fwd(
    tokens,
    sums_ptr,
    alpha_pre_ptr,
    alpha_post_ptr,
    alpha_res_ptr,
    bias_ptr,
    matrices_ptr,
    raw_ptr,
    packed_ptr,
    T,
    eps,
    N: tl.constexpr,
    NP: tl.constexpr,
    NN: tl.constexpr,
    M: tl.constexpr,
    LATER: tl.constexpr,
    PARTS: tl.constexpr,
    PROJECTION: tl.constexpr,
    ITERATIONS: tl.constexpr,
    READS: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    COUNT: tl.constexpr,
):
    """H_post and H_res, and H_pre where no program READS by it."""
    FIRST: tl.constexpr = N if READS else 0
    live = tokens < T
    raw = load_sums(sums_ptr, FIRST, tokens, live, M, LATER, PARTS, SPLITS, TILE, COUNT)
    inverse_rms = tl.load(raw_ptr + M * T + tokens, mask=live, other=0.0)
    write_raw(raw_ptr, raw, inverse_rms, FIRST, M, tokens, live, T)
    if not READS:
        write_pre(raw_ptr, alpha_pre_ptr, bias_ptr, packed_ptr, tokens, T, eps, N, NP, PROJECTION)
    write_later(
        raw_ptr,
        alpha_post_ptr,
        alpha_res_ptr,
        bias_ptr,
        matrices_ptr,
        packed_ptr,
        tokens,
        T,
        eps,
        N,
        NP,
        NN,
        M,
        PROJECTION,
        ITERATIONS,
    )


@triton.jit
def input_fwd(
    first,
    y_ptr,
    sums_ptr,
    alpha_ptr,
    bias_ptr,
    u_ptr,
    raw_ptr,
    packed_ptr,
    norm_weight_ptr,
    norm_inverse_rms_ptr,
    T,
    eps,
    norm_eps,
    C: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    PROJECTION: tl.constexpr,
    HAS_NORM: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """H_pre and u of BT tokens."""
    tokens = first + tl.arange(0, BT)
    live = tokens < T
    raw = load_sums(sums_ptr, 0, tokens, live, M, NP, PARTS, SPLITS, TILE, BT)
    inverse_rms = tl.load(raw_ptr + M * T + tokens, mask=live, other=0.0)
    write_raw(raw_ptr, raw, inverse_rms, 0, N, tokens, live, T)
    write_pre(raw_ptr, alpha_ptr, bias_ptr, packed_ptr, tokens, T, eps, N, NP, PROJECTION)
    mix_input(
        y_ptr + first * (N * C) + tl.arange(0, BT)[:, None] * (N * C),
        u_ptr + first * C + tl.arange(0, BT)[:, None] * C,
        packed_ptr,
        norm_weight_ptr,
        norm_inverse_rms_ptr,
        tokens,
        live,
        T,
        norm_eps,
        C,
        N,
        HAS_NORM,
        BT,
        BC,
        STAGES,
    )


@triton.jit
def load_sums(
    sums_ptr,
    first_row: tl.constexpr,
    tokens,
    live,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    BT: tl.constexpr,
):
    """``vec(y) phi``, [ROWS, BT], of ``project_fwd``'s sums in a fixed order."""
    rows = first_row + tl.arange(0, ROWS)[:, None]
    mask = (rows < M) & live[None, :]
    raw = tl.zeros([ROWS, BT], tl.float32)
    for split in tl.static_range(SPLITS):
        program = tokens // TILE * SPLITS + split
        block = sums_ptr + program * (PARTS * M * TILE) + tokens % TILE
        for part in tl.static_range(PARTS):
            raw += tl.load(block[None, :] + (part * M + rows) * TILE, mask=mask, other=0.0)
    return raw
