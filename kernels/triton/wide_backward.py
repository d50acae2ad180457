"""Backward, second pass, of many streams: as streams_backward.py, on tensor cores.

n (n + 1) sums of a token and as many coefficients are more than the registers of its threads, so
that what plain arithmetic would do per channel is two small products per token here: the gradients
of all streams by all streams, whose sums stay where the product leaves them, and H_res^T by the
gradients. Streams are one [BT, n, BC] block for them, or [BT, n * BC], stream before channel.

bfloat16 streams are exact as factors; what is float32 is two bfloat16 parts, as phi is. The product
with phi is carried from one chunk of channels to the next: see ``projected_product``.
"""

import triton
import triton.language as tl

from mhc_megatron.kernels.triton.tile_math import dot, phi_pointers, span_of, token_rows


@triton.jit
def load_terms(
    projected_ptr,
    part: tl.constexpr,
    first_row: tl.constexpr,
    tokens,
    live,
    T,
    M: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows of a part of the gradient of ``vec(y) phi``, [BT, ROWS]."""
    rows = first_row + tl.arange(0, ROWS)
    pointers = projected_ptr + (part * M + rows)[None, :] * T + tokens[:, None]
    return tl.load(pointers, mask=live[:, None] & (rows < M)[None, :], other=0.0)


@triton.jit
def load_phi(
    weight_ptr,
    part: tl.constexpr,
    first_row: tl.constexpr,
    columns,
    present,
    M: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """ROWS rows of a part of phi, [ROWS, columns]."""
    rows = first_row + tl.arange(0, ROWS)
    pointers = phi_pointers(
        weight_ptr, (part * M + rows)[None, :], columns[:, None], M, K, PARTS == 2
    )
    mask = present[:, None] & (rows < M)[None, :]
    return tl.trans(tl.load(pointers, mask=mask, other=0.0))


@triton.jit
def added(sums, product):
    """``sums + product``, which Triton would make the product's accumulator."""
    return tl.fma(product, 1.0, sums)


@triton.jit
def projected_product(
    high_head,
    high_tail,
    low_head,
    low_tail,
    weight_ptr,
    c,
    stop,
    C: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    PARTS: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """``grad_projected @ phi`` on the channels of a chunk, [BT, n * BC].

    Where a product goes into another one in the same iteration, Triton (3.6, 3.7) gives every warp
    all columns, and of 64 tokens the same ones to two or four groups of warps. So no product is
    another's accumulator, and the sum is used an iteration later.
    """
    column = tl.arange(0, N * BC)
    channels = c + column % BC
    present = channels < stop
    # Of ``split_wide``: the n numbers of a channel are neighbours.
    columns = channels * N + column // BC if PARTS == 2 else column // BC * C + channels
    nothing = tl.zeros([BT, N * BC], tl.float32)
    weight = load_phi(weight_ptr, 0, 0, columns, present, M, N * C, HEAD, PARTS)
    product = dot(high_head, weight, nothing, PRECISION)
    if TERMS >= 2:
        product = added(product, dot(low_head, weight, nothing, PRECISION))
    if TERMS == 3:
        weight = load_phi(weight_ptr, 1, 0, columns, present, M, N * C, HEAD, PARTS)
        product = added(product, dot(high_head, weight, nothing, PRECISION))
    if TAIL > 0:
        weight = load_phi(weight_ptr, 0, HEAD, columns, present, M, N * C, TAIL, PARTS)
        product = added(product, dot(high_tail, weight, nothing, PRECISION))
        if TERMS >= 2:
            product = added(product, dot(low_tail, weight, nothing, PRECISION))
        if TERMS == 3:
            weight = load_phi(weight_ptr, 1, HEAD, columns, present, M, N * C, TAIL, PARTS)
            product = added(product, dot(high_tail, weight, nothing, PRECISION))
    return product


@triton.jit
def turn_coefficients(
    block_ptr,
    packed_ptr,
    first_row: tl.constexpr,
    tokens,
    live,
    T,
    ROWS: tl.constexpr,
    BT: tl.constexpr,
):
    """Copy ROWS rows of [rows, T] to the program's own block [BT, ROWS]."""
    rows = tl.arange(0, ROWS)[None, :]
    coefficients = tl.load(
        packed_ptr + (first_row + rows) * T + tokens[:, None], mask=live[:, None], other=0.0
    )
    tl.store(block_ptr + tl.arange(0, BT)[:, None] * ROWS + rows, coefficients)


@triton.jit
def turned(block_ptr, ROWS: tl.constexpr, BT: tl.constexpr):
    """What ``turn_coefficients`` copied, [BT, ROWS]; loaded where it is used, not kept."""
    return tl.load(block_ptr + tl.arange(0, BT)[:, None] * ROWS + tl.arange(0, ROWS)[None, :])


@triton.jit
def load_mixing(block_ptr, N: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr):
    """Both parts of H_res of each token, [BT, 2 n, n]: every row is there twice, for both parts of
    what it multiplies. Of one part both are the same.

    o is the slowest index of the load. In the order of the product the tile would be in registers,
    and go to their places by shuffles in every iteration; so it is in shared memory.
    """
    o = tl.arange(0, N)[:, None, None]
    token, i = tl.arange(0, BT)[None, :, None], tl.arange(0, N)[None, None, :]
    mixing = tl.load(block_ptr + token * (N * N) + o * N + i)
    if PARTS == 1:
        high, low = mixing, mixing
    else:
        high = mixing.to(tl.bfloat16)
        low = (mixing - high.to(tl.float32)).to(tl.bfloat16)
    return twice(high, N, BT), twice(low, N, BT)


@triton.jit
def twice(mixing, N: tl.constexpr, BT: tl.constexpr):
    """[n, BT, n] as [BT, 2 n, n], neighbouring rows the same."""
    mixing = tl.permute(tl.join(mixing, mixing), [1, 0, 3, 2])
    return tl.reshape(mixing, [BT, 2 * N, N])


@triton.jit
def split_gradient(grad, PARTS: tl.constexpr, EXACT: tl.constexpr):
    """A float32 tile as factors: its high and its low part, or, EXACT in the first, itself and 0.

    The high part is cut off and not rounded: it is the upper half of the number.
    """
    if PARTS == 1:
        high, low = grad, tl.zeros_like(grad)
    elif EXACT:
        high = grad.to(tl.bfloat16)
        low = tl.zeros_like(high)
    else:
        bits = grad.to(tl.int32, bitcast=True)
        high = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        low = (grad - (bits & -65536).to(tl.float32, bitcast=True)).to(tl.bfloat16)
    return high, low


@triton.jit
def pair_tokens(tile, N: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """[BT, n, BC] as [BT / 2, 2 n, BC]: tokens that are eight apart share a product.

    Its 16 rows are then full, and eight apart are the two that a thread holds anyway.
    """
    tile = tl.permute(tl.reshape(tile, [BT // 16, 2, 8, N, BC]), [0, 2, 1, 3, 4])
    return tl.reshape(tile, [BT // 2, 2 * N, BC])


@triton.jit
def own_sums(pairs, N: tl.constexpr, BT: tl.constexpr):
    """[BT, n, n] of [BT / 2, 2 n, 2 n], without the products of a token with the other one."""
    pairs = tl.reshape(pairs, [BT // 16, 8, 2, N, 2, N])
    same = tl.arange(0, 2)[:, None] == tl.arange(0, 2)[None, :]
    pairs = tl.sum(tl.where(same[None, None, :, None, :, None], pairs, 0.0), axis=4)
    return tl.reshape(tl.permute(pairs, [0, 2, 1, 3, 4]), [BT, N, N])


@triton.jit
def quad_sums(product, N: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """Sums over channels of [BT, n, BC], [BT, n, 4]: four lanes hold a row of a product.

    No thread needs another's numbers until the loop over the channels is done.
    """
    product = tl.reshape(product, [BT, N, BC // 8, 4, 2])
    return tl.sum(tl.sum(product, axis=4), axis=2)


@triton.jit
def wide_streams_bwd(
    grad_y_ptr,
    grad_u_ptr,
    x_ptr,
    y_ptr,
    branch_ptr,
    branch_bias_ptr,
    packed_ptr,
    next_packed_ptr,
    projected_ptr,
    radial_ptr,
    weight_ptr,
    grad_x_ptr,
    grad_branch_ptr,
    sums_ptr,
    T,
    C: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    PARTS: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_GRAD_Y: tl.constexpr,
    HAS_PRE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SINGLE_PASS: tl.constexpr,
    SPAN: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """``streams_bwd`` of BT tokens and SPAN channels; the new streams ``y`` are read.

    ``sums``: [programs, n (n + 2), BT], of the gradients of ``packed`` over a program's channels;
    until they are known, the program's coefficients by token. ``weight``: phi, of ``split_wide``
    where there are two PARTS; the M rows of each are HEAD and up to TAIL more.
    """
    SPLITS: tl.constexpr = (C + SPAN - 1) // SPAN
    K: tl.constexpr = N * C
    T = tl.cast(T, tl.int64)
    first, tokens, live = token_rows(T, BT, SPLITS)
    column = tl.arange(0, N * BC)
    places = tl.arange(0, BT)[:, None] * K + (column // BC * C + column % BC)[None, :]
    branch_places = tl.arange(0, BT)[:, None] * C + tl.arange(0, BC)[None, :]
    x_ptr += first * K
    grad_x_ptr += first * K
    branch_ptr += first * C
    grad_branch_ptr += first * C
    if HAS_GRAD_Y:
        grad_y_ptr += first * K
    sums_ptr += tl.program_id(0).to(tl.int64) * (N * (N + 2) * BT)
    post_ptr = sums_ptr + N * N * BT
    read_ptr = post_ptr + N * BT
    turn_coefficients(sums_ptr, packed_ptr, 2 * N, tokens, live, T, N * N, BT)
    turn_coefficients(post_ptr, packed_ptr, N, tokens, live, T, N, BT)
    start, stop = span_of(C, SPAN)
    begin = start
    if HAS_PRE:
        y_ptr += first * K
        grad_u_ptr += first * C
        radial_ptr += first
        reads = packed_ptr if SINGLE_PASS else next_packed_ptr
        turn_coefficients(read_ptr, reads, 0, tokens, live, T, N, BT)
        high_head = load_terms(projected_ptr, 0, 0, tokens, live, T, M, HEAD)
        low_head = high_head
        high_tail = high_head
        low_tail = high_head
        if TERMS >= 2:
            low_head = load_terms(projected_ptr, 1, 0, tokens, live, T, M, HEAD)
        if TAIL > 0:
            high_tail = load_terms(projected_ptr, 0, HEAD, tokens, live, T, M, TAIL)
            if TERMS >= 2:
                low_tail = load_terms(projected_ptr, 1, HEAD, tokens, live, T, M, TAIL)
        product = tl.zeros([BT, N * BC], tl.float32)
        # One iteration more, which only makes the first product.
        begin = start - BC
    if SINGLE_PASS:
        read_sums = tl.zeros([BT, N, 4], tl.float32)
    post_sums = tl.zeros([BT, N, 4], tl.float32)
    # Of ``res[o, i]`` at [.., i, o].
    res_sums = tl.zeros([BT // 2, 2 * N, 2 * N], tl.float32)
    # Other threads than wrote the coefficients read them.
    tl.debug_barrier()
    mixing_high, mixing_low = load_mixing(sums_ptr, N, PARTS, BT)

    for c in tl.range(begin, stop, BC):
        running = live
        if HAS_PRE:
            running = live & (c >= start)
        mask = running[:, None]
        branch_mask = mask
        if C % BC != 0:
            mask = mask & (c + column % BC < C)[None, :]
            branch_mask = branch_mask & (c + tl.arange(0, BC) < C)[None, :]
        x = tl.load(x_ptr + c + places, mask=mask, other=0.0)
        branch = tl.load(branch_ptr + c + branch_places, mask=branch_mask, other=0.0)
        branch = branch.to(tl.float32)
        if HAS_BIAS:
            bias_places = c + tl.zeros([BT, 1], tl.int32) + tl.arange(0, BC)[None, :]
            bias = tl.load(branch_bias_ptr + bias_places, mask=branch_mask, other=0.0)
            branch += bias.to(tl.float32)
        grad = tl.zeros([BT, N * BC], tl.float32)
        if HAS_GRAD_Y:
            grad_y = tl.load(
                grad_y_ptr + c + places, mask=mask, other=0.0, eviction_policy="evict_first"
            )
            grad = grad_y.to(tl.float32)
        if HAS_PRE:
            # three uses of x': raw's product with phi, its division by the RMS, and the read
            y = tl.load(y_ptr + c + places, mask=mask, other=0.0).to(tl.float32)
            grad_u = tl.load(grad_u_ptr + c + branch_places, mask=branch_mask, other=0.0)
            grad_u = grad_u.to(tl.float32)[:, None, :]
            radial = tl.load(radial_ptr + tl.arange(0, BT), mask=live, other=0.0)
            grad += product + radial[:, None] * y
            read = turned(read_ptr, N, BT)
            grad = tl.reshape(grad, [BT, N, BC]) + read[:, :, None] * grad_u
            if SINGLE_PASS:
                read_sums += quad_sums(tl.reshape(y, [BT, N, BC]) * grad_u, N, BT, BC)
        else:
            grad = tl.reshape(grad, [BT, N, BC])
        # x'[o] = sum_i H_res[o, i] x[i] + H_post[o] f
        post_sums += quad_sums(grad * branch[:, None, :], N, BT, BC)
        post = turned(post_ptr, N, BT)
        grad_branch = tl.sum(post[:, :, None] * grad, axis=1)
        grad_branch = grad_branch.to(grad_branch_ptr.dtype.element_ty)
        tl.store(grad_branch_ptr + c + branch_places, grad_branch, mask=branch_mask)
        high, low = split_gradient(grad, PARTS, not HAS_PRE)
        factor = pair_tokens(tl.reshape(x, [BT, N, BC]), N, BT, BC).to(high.dtype)
        pairs = tl.permute(pair_tokens(high, N, BT, BC), [0, 2, 1])
        res_sums = dot(factor, pairs, res_sums, PRECISION)
        if PARTS == 2 and HAS_PRE:
            pairs = tl.permute(pair_tokens(low, N, BT, BC), [0, 2, 1])
            res_sums = dot(factor, pairs, res_sums, PRECISION)
        both = tl.reshape(tl.permute(tl.join(high, low), [0, 1, 3, 2]), [BT, 2 * N, BC])
        both = tl.permute(both, [0, 2, 1])
        grad_x = dot(both, mixing_high, tl.zeros([BT, BC, N], tl.float32), PRECISION)
        if PARTS == 2:
            grad_x = dot(both, mixing_low, grad_x, PRECISION)
        grad_x = tl.reshape(tl.permute(grad_x, [0, 2, 1]), [BT, N * BC])
        grad_x = grad_x.to(grad_x_ptr.dtype.element_ty)
        tl.store(grad_x_ptr + c + places, grad_x, mask=mask)
        if HAS_PRE:
            product = projected_product(
                high_head,
                high_tail,
                low_head,
                low_tail,
                weight_ptr,
                c + BC,
                stop,
                C,
                N,
                M,
                HEAD,
                TAIL,
                PARTS,
                TERMS,
                PRECISION,
                BT,
                BC,
            )

    # All threads have read the coefficients.
    tl.debug_barrier()
    token = tl.arange(0, BT)[:, None]
    row = tl.arange(0, N)[None, :]
    if SINGLE_PASS:
        tl.store(sums_ptr + row * BT + token, tl.sum(read_sums, axis=2))
    else:
        tl.store(sums_ptr + row * BT + token, tl.zeros([BT, N], tl.float32))
    tl.store(sums_ptr + (N + row) * BT + token, tl.sum(post_sums, axis=2))
    rows = (2 + row[:, None, :]) * N + tl.arange(0, N)[None, :, None]
    tl.store(sums_ptr + rows * BT + token[:, :, None], own_sums(res_sums, N, BT))


@triton.jit
def add_splits(
    sums_ptr,
    total_ptr,
    T,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    BT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK tokens of a row of ``total`` [ROWS, T] from ``sums`` [tiles, SPLITS, ROWS, BT]."""
    T = tl.cast(T, tl.int64)
    _, tokens, live = token_rows(T, BLOCK)
    row = tl.program_id(1)
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        program = tokens // BT * SPLITS + split
        total += tl.load(sums_ptr + (program * ROWS + row) * BT + tokens % BT, mask=live, other=0.0)
    tl.store(total_ptr + row * T + tokens, total, mask=live)
