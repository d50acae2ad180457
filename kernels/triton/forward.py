"""Forward kernels: the next streams, the branch's input and the mappings, in one pass."""

import triton
import triton.language as tl

from mhc_megatron.kernels.triton.coefficients import write_later, write_pre
from mhc_megatron.kernels.triton.norm import normalise
from mhc_megatron.kernels.triton.tile_math import (
    GROUP,
    channel_mask,
    dot,
    in_two_parts,
    interleaved_place,
    lane_sums,
    load_branch,
    load_coefficients,
    load_streams,
    load_weight,
    post_mix_stream,
    pre_mix,
    rounded,
    side_by_side,
    span_of,
    token_rows,
    widened,
)


@triton.jit
def split_weight(
    weight_ptr,
    split_ptr,
    chunks_ptr,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """float32 phi ``in_two_parts``, [2, SIZE].

    Products with bfloat16 streams are then exact in float32, where tf32 would round phi to 11 bits.
    INTERLEAVED has them in the order of ``separate``, for the backward, and also in ``chunks``,
    [ceil(C / WIDTH), 2 ROWS, N * WIDTH]: what ``mix_fwd`` multiplies at a time is one piece of
    memory, with each part in the first of ROWS rows, and its streams one after the other.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < SIZE
    source = offsets
    if INTERLEAVED:
        # The inverse of ``interleaved_place``.
        column = offsets % (N * C)
        stream, channel = column // GROUP % N, column // (N * GROUP) * GROUP + column % GROUP
        source = in_groups(offsets - column + stream * C + channel)
    weight = tl.load(weight_ptr + source, mask=mask)
    high, low = in_two_parts(weight)
    tl.store(split_ptr + offsets, high, mask=mask)
    tl.store(split_ptr + SIZE + offsets, low, mask=mask)
    if INTERLEAVED:
        PART: tl.constexpr = ROWS * N * WIDTH
        place = channel // WIDTH * (2 * PART) + offsets // (N * C) * (N * WIDTH)
        place = in_groups(place + stream * WIDTH + channel % WIDTH)
        tl.store(chunks_ptr + place, high, mask=mask)
        tl.store(chunks_ptr + PART + place, low, mask=mask)


@triton.jit
def in_groups(offsets):
    """Offsets of GROUP neighbours each, which the compiler does not see and would move singly."""
    return tl.max_contiguous(tl.multiple_of(offsets, [GROUP]), [GROUP])


@triton.jit
def split_wide(
    weight_ptr,
    split_ptr,
    C: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    BC: tl.constexpr,
):
    """``split_weight`` for many streams: [K, 2 M], K in the order of ``interleaved_place``.

    A chunk of channels of all streams is then one piece of memory. BC channels of one stream.
    """
    stream = tl.program_id(0) % N
    channels = tl.program_id(0) // N * BC + tl.arange(0, BC)[None, :]
    rows = tl.arange(0, MP)[:, None]
    mask = (rows < M) & (channels < C)
    weight = tl.load(weight_ptr + rows * (N * C) + stream * C + channels, mask=mask, other=0.0)
    high, low = in_two_parts(weight)
    pointers = split_ptr + interleaved_place(stream, channels, N) * (2 * M) + rows
    tl.store(pointers, high, mask=mask)
    tl.store(pointers + M, low, mask=mask)


@triton.jit
def write_raw(raw_ptr, raw, inverse_rms, first_row, LAST: tl.constexpr, tokens, live, T):
    """``raw = vec(x) phi / sqrt(mean(vec(x)^2) + eps)`` from ``vec(x) phi``, [rows, BT], of which
    those below LAST are written; the program may then read them."""
    raw *= inverse_rms[None, :]
    rows = first_row + tl.arange(0, raw.shape[0])[:, None]
    mask = (rows < LAST) & live[None, :]
    tl.store(raw_ptr + rows * T + tokens[None, :], raw, mask=mask)
    # Other threads than wrote them read raw, and behind it the mappings and y.
    tl.debug_barrier()


@triton.jit
def mix_input(
    y_rows,
    u_rows,
    packed_ptr,
    norm_weight_ptr,
    norm_inverse_rms_ptr,
    tokens,
    live,
    T,
    norm_eps,
    C: tl.constexpr,
    N: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """u by the mappings that the program wrote to ``packed``.

    ``y_rows``, ``u_rows``: [BT, 1], places of each token's streams and of its u.
    """
    # From memory, whose loads take the layout of the tiles of streams. Of many streams these
    # took the layout of registers, a token per lane, and every load of a tile all lanes' bank.
    tl.debug_barrier()
    read = load_coefficients(packed_ptr, 0, tokens, live, T, N)
    # From the last chunk to the first: what was written last is still in L2.
    CHUNKS: tl.constexpr = (C + BC - 1) // BC
    if HAS_NORM:
        u_squares = tl.zeros([BT, BC], tl.float32)
    for chunk in tl.range(0, CHUNKS, num_stages=STAGES):
        c = (CHUNKS - 1 - chunk) * BC
        mask = channel_mask(live, c, C, BC)
        y_tiles = load_streams(y_rows, c, mask, N, C, BC, "evict_first")
        # u = sum_i H_pre[i] x[i]
        u = pre_mix(y_tiles, read, N)
        u_pointers = u_rows + (c + tl.arange(0, BC))[None, :]
        stored = u.to(u_rows.dtype.element_ty)
        tl.store(u_pointers, stored, mask=mask)
        if HAS_NORM:
            wide = widened(stored)
            u_squares += wide * wide
    if HAS_NORM:
        # v = w u / sqrt(mean(u^2) + eps), in u's place
        norm_inverse_rms = tl.rsqrt(tl.sum(u_squares, axis=1) / C + norm_eps)
        tl.store(norm_inverse_rms_ptr + tokens, norm_inverse_rms, mask=live)
        normalise(u_rows, norm_weight_ptr, norm_inverse_rms, live, C, BC, STAGES)


@triton.jit
def mix_fwd(
    x_ptr,
    branch_ptr,
    branch_bias_ptr,
    packed_ptr,
    weight_ptr,
    alpha_pre_ptr,
    alpha_post_ptr,
    alpha_res_ptr,
    bias_ptr,
    matrices_ptr,
    y_ptr,
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
    PARTS: tl.constexpr,
    PROJECTION: tl.constexpr,
    ITERATIONS: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_POST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SINGLE_PASS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``post_pre`` of BT tokens; without HAS_POST ``pre``, whose y is x and is not written.

    SINGLE_PASS reads the new streams with the coefficients that ``packed`` holds, so that nothing
    has to be read twice. ``weight`` is phi, [PARTS, M, K], or INTERLEAVED ``split_weight``'s chunks
    of BC channels: all streams of one are one product, which tensor cores start once instead of n
    times. HAS_NORM, which is not for SINGLE_PASS, normalises u and stores 1/RMS, [T].
    """
    T = tl.cast(T, tl.int64)
    first, tokens, live = token_rows(T, BT)
    K: tl.constexpr = N * C
    rows = tl.arange(0, BT)[:, None] * K
    branch_rows = tl.arange(0, BT)[:, None] * C
    x_ptr += first * K
    y_ptr += first * K
    u_ptr += first * C
    if HAS_POST:
        branch_ptr += first * C
        post = load_coefficients(packed_ptr, N, tokens, live, T, N)
        res = load_coefficients(packed_ptr, 2 * N, tokens, live, T, N * N)
    if SINGLE_PASS:
        read = load_coefficients(packed_ptr, 0, tokens, live, T, N)

    # phi's parts one below the other: one product with M = 64 rows for n = 4.
    m = tl.arange(0, PARTS * MP) % MP
    if INTERLEAVED:
        weight_rows = weight_ptr + tl.arange(0, PARTS * MP)[:, None] * (N * BC)
    else:
        weight_rows = weight_ptr + ((tl.arange(0, PARTS * MP) // MP) * M + m)[:, None] * K
    projected = tl.zeros([PARTS * MP, BT], tl.float32)
    squares = tl.zeros([BT, BC], tl.float32)
    # L2 is kept for what is read again: the new streams.
    X_EVICTION: tl.constexpr = "evict_first" if HAS_POST or SINGLE_PASS else "evict_last"
    Y_EVICTION: tl.constexpr = "" if SINGLE_PASS else "evict_last"
    for c in tl.range(0, C, BC, num_stages=STAGES):
        mask = channel_mask(live, c, C, BC)
        channels = c + tl.arange(0, BC)
        if HAS_POST:
            x = load_streams(x_ptr + rows, c, mask, N, C, BC, X_EVICTION)
            branch = load_branch(
                branch_ptr + branch_rows, branch_bias_ptr, c, mask, HAS_BIAS, C, BC
            )
        if SINGLE_PASS:
            u = tl.zeros([BT, BC], tl.float32)
        ys = ()
        for o in tl.static_range(N):
            if HAS_POST:
                # x'[o] = sum_i H_res[o, i] x[i] + H_post[o] f, rounded to the streams' dtype
                y = post_mix_stream(x, branch, post, res, o, N)
                y = rounded(y, y_ptr.dtype.element_ty)
                y_pointers = y_ptr + rows + (o * C + channels)[None, :]
                tl.store(y_pointers, y, mask=mask, eviction_policy=Y_EVICTION)
            else:
                pointers = x_ptr + rows + (o * C + channels)[None, :]
                y = tl.load(pointers, mask=mask, other=0.0, eviction_policy=X_EVICTION)
            # vec(x) phi and mean(vec(x)^2)
            wide = widened(y)
            squares += wide * wide
            if INTERLEAVED:
                ys = ys + (y,)
            else:
                weight = load_weight(weight_rows, o * C + channels, channels < C, m < M)
                factor = tl.trans(y.to(weight_ptr.dtype.element_ty))
                projected = dot(weight, factor, projected, PRECISION)
            if SINGLE_PASS:
                u = tl.fma(read[o][:, None], wide, u)
        if INTERLEAVED:
            numbers = tl.arange(0, N * BC)[None, :]
            weight_mask = (m < M)[:, None]
            if C % BC != 0:
                weight_mask = weight_mask & (c + numbers % BC < C)
            weight_chunk = weight_rows + c * (PARTS * MP * N) + numbers
            weight = tl.load(weight_chunk, mask=weight_mask, other=0.0)
            projected = dot(weight, tl.trans(side_by_side(ys, N, BT, BC)), projected, PRECISION)
        if SINGLE_PASS:
            u_pointers = u_ptr + branch_rows + channels[None, :]
            tl.store(u_pointers, u.to(u_ptr.dtype.element_ty), mask=mask)

    inverse_rms = store_inverse_rms(raw_ptr + M * T, squares, tokens, live, rms_eps, K)
    raw = tl.sum(tl.reshape(projected, [PARTS, MP, BT]), axis=0)
    write_raw(raw_ptr, raw, inverse_rms, 0, M, tokens, live, T)
    write_pre(raw_ptr, alpha_pre_ptr, bias_ptr, next_packed_ptr, tokens, T, eps, N, NP, PROJECTION)
    write_later(
        raw_ptr,
        alpha_post_ptr,
        alpha_res_ptr,
        bias_ptr,
        matrices_ptr,
        next_packed_ptr,
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
    if not SINGLE_PASS:
        mix_input(
            (y_ptr if HAS_POST else x_ptr) + rows,
            u_ptr + branch_rows,
            next_packed_ptr,
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
def post_fwd(
    x_ptr,
    branch_ptr,
    branch_bias_ptr,
    packed_ptr,
    y_ptr,
    u_ptr,
    raw_ptr,
    T,
    rms_eps,
    C: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    READS: tl.constexpr,
    SQUARES: tl.constexpr,
    SPAN: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``post`` of BT tokens and SPAN channels: ``x'[o] = sum_i H_res[o, i] x[i] + H_post[o] f``.

    The mappings are loaded once for all of them, and stay in registers. READS also mixes u, by the
    mappings that write, as single_pass reads. SQUARES, of programs that have all channels, also
    stores 1/RMS of the new streams, in row M of ``raw``.
    """
    T = tl.cast(T, tl.int64)
    SPLITS: tl.constexpr = (C + SPAN - 1) // SPAN
    first, tokens, live = token_rows(T, BT, SPLITS)
    rows = tl.arange(0, BT)[:, None] * (N * C)
    branch_rows = tl.arange(0, BT)[:, None] * C
    branch_ptr += first * C
    x_ptr += first * (N * C)
    y_ptr += first * (N * C)
    post = load_coefficients(packed_ptr, N, tokens, live, T, N)
    res = load_coefficients(packed_ptr, 2 * N, tokens, live, T, N * N)
    if READS:
        u_ptr += first * C
        read = load_coefficients(packed_ptr, 0, tokens, live, T, N)
    if SQUARES:
        squares = tl.zeros([BT, BC // VECTOR], tl.float32)
    start, stop = span_of(C, SPAN)
    for c in tl.range(start, stop, BC, num_stages=STAGES):
        mask = channel_mask(live, c, C, BC)
        x = load_streams(x_ptr + rows, c, mask, N, C, BC, "")
        branch = load_branch(branch_ptr + branch_rows, branch_bias_ptr, c, mask, HAS_BIAS, C, BC)
        ys = ()
        for o in tl.static_range(N):
            y = post_mix_stream(x, branch, post, res, o, N).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + rows + (o * C + c + tl.arange(0, BC))[None, :], y, mask=mask)
            if READS or SQUARES:
                wide = widened(y)
                ys = ys + (wide,)
            if SQUARES:
                squares += lane_sums(wide * wide, BT, BC, VECTOR)
        if READS:
            u = pre_mix(ys, read, N).to(u_ptr.dtype.element_ty)
            tl.store(u_ptr + branch_rows + (c + tl.arange(0, BC))[None, :], u, mask=mask)
    if SQUARES:
        store_inverse_rms(raw_ptr + M * T, squares, tokens, live, rms_eps, N * C)


@triton.jit
def store_inverse_rms(inverse_rms_ptr, squares, tokens, live, rms_eps, K: tl.constexpr):
    """1/RMS of a token's K numbers, from sums of their squares, [BT, any number]; returns it."""
    inverse_rms = tl.rsqrt(tl.sum(squares, axis=1) / K + rms_eps)
    tl.store(inverse_rms_ptr + tokens, inverse_rms, mask=live)
    return inverse_rms
