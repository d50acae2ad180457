"""Forward, second half where programs share a token's channels: mappings of their sums, and u."""

import triton
import triton.language as tl

from mhc_megatron.kernels.triton.coefficients import write_later, write_pre
from mhc_megatron.kernels.triton.forward import mix_input, write_raw


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
    LATER: tl.constexpr,
    PARTS: tl.constexpr,
    PROJECTION: tl.constexpr,
    ITERATIONS: tl.constexpr,
    READS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    SQUARES: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    COUNT: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Raw logits and mappings, and if it READS u.

    The first programs have COUNT tokens each, H_post and H_res, whose iterations wait for each
    other; the others BT tokens, H_pre and u, and wait for memory. Without READS there are only the
    first, which have all mappings.

    ``sums``: of ``project_fwd`` in tiles of TILE tokens, of SPLITS programs each; with SQUARES of
    ``hopper_mix_fwd``, and 1/RMS is made of them, else it is in row M of ``raw``. LATER: a power of
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
            rms_eps,
            eps,
            C,
            N,
            NP,
            NN,
            M,
            LATER,
            PARTS,
            PROJECTION,
            ITERATIONS,
            READS,
            SQUARES,
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
            rms_eps,
            eps,
            norm_eps,
            C,
            N,
            NP,
            M,
            PARTS,
            PROJECTION,
            HAS_NORM,
            SQUARES,
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
    rms_eps,
    eps,
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
    SQUARES: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    COUNT: tl.constexpr,
):
    """H_post and H_res, and H_pre where no program READS by it; 1/RMS is stored if it was not."""
    FIRST: tl.constexpr = N if READS else 0
    live = tokens < T
    raw = load_sums(sums_ptr, FIRST, tokens, live, M, LATER, PARTS, SQUARES, SPLITS, TILE, COUNT)
    inverse_rms = load_inverse_rms(
        raw_ptr, sums_ptr, tokens, live, T, rms_eps, N * C, M, PARTS, SQUARES, SPLITS, TILE
    )
    if SQUARES:
        tl.store(raw_ptr + M * T + tokens, inverse_rms, mask=live)
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
    rms_eps,
    eps,
    norm_eps,
    C: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    PROJECTION: tl.constexpr,
    HAS_NORM: tl.constexpr,
    SQUARES: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """H_pre and u of BT tokens."""
    tokens = first + tl.arange(0, BT)
    live = tokens < T
    raw = load_sums(sums_ptr, 0, tokens, live, M, NP, PARTS, SQUARES, SPLITS, TILE, BT)
    inverse_rms = load_inverse_rms(
        raw_ptr, sums_ptr, tokens, live, T, rms_eps, N * C, M, PARTS, SQUARES, SPLITS, TILE
    )
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
def sums_of(
    sums_ptr,
    tokens,
    split: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    SQUARES: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Places of each token's first number in one of the SPLITS programs' [rows, TILE]."""
    ROWS: tl.constexpr = PARTS * M + 1 if SQUARES else PARTS * M
    program = tokens // TILE * SPLITS + split
    return sums_ptr + program * (ROWS * TILE) + tokens % TILE


@triton.jit
def load_sums(
    sums_ptr,
    first_row: tl.constexpr,
    tokens,
    live,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    SQUARES: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    BT: tl.constexpr,
):
    """``vec(y) phi``, [ROWS, BT], of the programs' sums in a fixed order."""
    rows = first_row + tl.arange(0, ROWS)[:, None]
    mask = (rows < M) & live[None, :]
    raw = tl.zeros([ROWS, BT], tl.float32)
    for split in tl.static_range(SPLITS):
        block = sums_of(sums_ptr, tokens, split, M, PARTS, SQUARES, SPLITS, TILE)
        for part in tl.static_range(PARTS):
            raw += tl.load(block[None, :] + (part * M + rows) * TILE, mask=mask, other=0.0)
    return raw


@triton.jit
def load_inverse_rms(
    raw_ptr,
    sums_ptr,
    tokens,
    live,
    T,
    rms_eps,
    K: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    SQUARES: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """1/RMS of each token: of the programs' SQUARES, or as another kernel left it."""
    if SQUARES:
        squares = tl.zeros_like(live.to(tl.float32))
        for split in tl.static_range(SPLITS):
            block = sums_of(sums_ptr, tokens, split, M, PARTS, SQUARES, SPLITS, TILE)
            squares += tl.load(block + PARTS * M * TILE, mask=live, other=0.0)
        inverse_rms = tl.rsqrt(squares / K + rms_eps)
    else:
        inverse_rms = tl.load(raw_ptr + M * T + tokens, mask=live, other=0.0)
    return inverse_rms
