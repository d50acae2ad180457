"""Backward, second pass, of many streams: as streams_backward.py, in tiles that hold their sums.

n (n + 1) sums of a token fill a thread's registers, so that it holds few channels of one token, and
no coefficients: they are loaded where they are used. The new streams are read, not built again. phi
has n (n + 2) rows: a program has as many tokens as a tensor core wants, reads phi once for them,
and takes a part of the channels.
"""

import triton
import triton.language as tl

from mhc_megatron.kernels.triton.tile_math import (
    channel_mask,
    dot,
    gather_coefficients,
    gathered,
    interleaved_place,
    lane_sums,
    load_radial,
    phi_pointers,
    span_of,
    token_rows,
    with_bias,
    zero_sums,
)


@triton.jit
def load_terms(
    projected_ptr, tokens, live, T, M: tl.constexpr, TERMS: tl.constexpr, DEPTH: tl.constexpr
):
    """Left factors of the terms of ``grad_projected @ phi`` side by side, [BT, DEPTH].

    Of three: high, low, high.
    """
    term = tl.arange(0, DEPTH)
    row = tl.where(term < 2 * M, term, term - 2 * M)
    pointers = projected_ptr + row[None, :] * T + tokens[:, None]
    return tl.load(pointers, mask=live[:, None] & (term < TERMS * M)[None, :], other=0.0)


@triton.jit
def term_product(
    terms,
    weight_ptr,
    columns,
    M: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    WIDTH: tl.constexpr,
    LAST: tl.constexpr,
    TERMS: tl.constexpr,
    DEPTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``grad_projected @ phi`` on WIDTH columns below LAST: all terms are one product.

    Its right factors are, of three, phi's high part twice and its low part. Products one after the
    other would give every warp all columns, and of 64 tokens the same ones to two groups of warps.
    """
    term = tl.arange(0, DEPTH)
    row = tl.where(term < M, term, term - M)
    pointers = phi_pointers(weight_ptr, row[None, :], columns[:, None], M, K, TRANSPOSED)
    mask = (columns < LAST)[:, None] & (term < TERMS * M)[None, :]
    weight = tl.load(pointers, mask=mask, other=0.0)
    return dot(terms, tl.trans(weight), tl.zeros([BT, WIDTH], tl.float32), PRECISION)


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
    TERMS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_GRAD_Y: tl.constexpr,
    HAS_PRE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SINGLE_PASS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SPAN: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """``streams_bwd`` of BT tokens and SPAN channels.

    ``sums``: [programs, n (n + 2), BT], of the gradients of ``packed`` over a program's channels;
    until they are known, the program's coefficients, side by side. Behind them, where INTERLEAVED,
    a chunk's products with phi of every program, [programs, BT, n * BC]. ``weight``: of
    ``split_wide`` where INTERLEAVED.
    """
    SPLITS: tl.constexpr = (C + SPAN - 1) // SPAN
    T = tl.cast(T, tl.int64)
    first, tokens, live = token_rows(T, BT, SPLITS)
    K: tl.constexpr = N * C
    rows = tl.arange(0, BT)[:, None] * K
    branch_rows = tl.arange(0, BT)[:, None] * C
    columns = tl.arange(0, BC)
    x_ptr += first * K
    grad_x_ptr += first * K
    if HAS_GRAD_Y:
        grad_y_ptr += first * K
    branch_ptr += first * C
    grad_branch_ptr += first * C
    program = tl.program_id(0).to(tl.int64)
    products_ptr = sums_ptr + tl.num_programs(0).to(tl.int64) * (N * (N + 2) * BT)
    products_ptr += program * (BT * N * BC) + tl.arange(0, BT)[:, None] * (N * BC)
    sums_ptr += program * (N * (N + 2) * BT)
    post_sums = zero_sums(N, BT, BC // VECTOR)
    # Of ``res[o, i]`` in place i * n + o.
    res_sums = zero_sums(N * N, BT, BC // VECTOR)
    if HAS_PRE:
        y_ptr += first * K
        grad_u_ptr += first * C
        read_ptr = packed_ptr if SINGLE_PASS else next_packed_ptr
        radial = load_radial(radial_ptr, tokens, live, T, SINGLE_PASS)
        terms = load_terms(projected_ptr, tokens, live, T, M, TERMS, DEPTH)
        gather_coefficients(sums_ptr, read_ptr, 0, tokens, live, T, N, BT)
    if SINGLE_PASS:
        read_sums = zero_sums(N, BT, BC // VECTOR)

    gather_coefficients(sums_ptr, packed_ptr, N, tokens, live, T, N * (N + 1), BT)
    # Other threads than wrote them read them.
    tl.debug_barrier()

    start, stop = span_of(C, SPAN)
    # Without stages of its own only what a product takes is loaded ahead, phi: there is no room for
    # more.
    for c in tl.range(start, stop, BC):
        mask = channel_mask(live, c, C, BC)
        # All of the chunk is on its way while the product runs.
        f_pointers = branch_ptr + branch_rows + (c + columns)[None, :]
        branch = tl.load(f_pointers, mask=mask, other=0.0)
        xs = ()
        ys = ()
        grads_y = ()
        for o in tl.static_range(N):
            offsets = rows + (o * C + c + columns)[None, :]
            xs = xs + (tl.load(x_ptr + offsets, mask=mask, other=0.0),)
            if HAS_PRE:
                ys = ys + (tl.load(y_ptr + offsets, mask=mask, other=0.0),)
            if HAS_GRAD_Y:
                grad = tl.load(
                    grad_y_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first"
                )
                grads_y = grads_y + (grad,)
        if HAS_PRE:
            u_pointers = grad_u_ptr + branch_rows + (c + columns)[None, :]
            grad_u = tl.load(u_pointers, mask=mask, other=0.0)
            if INTERLEAVED:
                products = term_product(
                    terms,
                    weight_ptr,
                    c * N + tl.arange(0, N * BC),
                    M,
                    K,
                    BT,
                    N * BC,
                    K,
                    TERMS,
                    DEPTH,
                    True,
                    PRECISION,
                )
                # By way of memory, from where they are loaded as the streams are. Taken apart in
                # registers they have the layout of a product, and all else of the chunk is brought
                # into it, tile by tile, between two barriers each.
                tl.debug_barrier()
                tl.store(products_ptr + tl.arange(0, N * BC)[None, :], products)
                tl.debug_barrier()
            grad_u = grad_u.to(tl.float32)
        branch = with_bias(branch, branch_bias_ptr, c + columns, HAS_BIAS, C)
        grad_branch = tl.zeros([BT, BC], tl.float32)
        grads = ()
        next_post_sums = ()
        if SINGLE_PASS:
            next_read_sums = ()
        for o in tl.static_range(N):
            grad = tl.zeros([BT, BC], tl.float32)
            if HAS_GRAD_Y:
                grad = grads_y[o].to(tl.float32)
            if HAS_PRE:
                y = ys[o].to(tl.float32)
                # three uses of x': raw's product with phi, its division by the RMS, and the read
                read = gathered(sums_ptr, o, BT)
                grad += radial[:, None] * y + read[:, None] * grad_u
                if INTERLEAVED:
                    grad += tl.load(products_ptr + interleaved_place(o, columns, N)[None, :])
                else:
                    grad += term_product(
                        terms,
                        weight_ptr,
                        o * C + c + columns,
                        M,
                        K,
                        BT,
                        BC,
                        (o + 1) * C,
                        TERMS,
                        DEPTH,
                        False,
                        PRECISION,
                    )
                if SINGLE_PASS:
                    read_sum = read_sums[o] + lane_sums(grad_u * y, BT, BC, VECTOR)
                    next_read_sums = next_read_sums + (read_sum,)
            # x'[o] = sum_i H_res[o, i] x[i] + H_post[o] f
            post = gathered(sums_ptr, N + o, BT)
            post_sum = post_sums[o] + lane_sums(grad * branch, BT, BC, VECTOR)
            next_post_sums = next_post_sums + (post_sum,)
            grad_branch += post[:, None] * grad
            grads = grads + (grad,)
        post_sums = next_post_sums
        if SINGLE_PASS:
            read_sums = next_read_sums
        pointers = grad_branch_ptr + branch_rows + (c + columns)[None, :]
        tl.store(pointers, grad_branch.to(grad_branch_ptr.dtype.element_ty), mask=mask)
        next_res_sums = ()
        for i in tl.static_range(N):
            offsets = rows + (i * C + c + columns)[None, :]
            x = xs[i].to(tl.float32)
            grad_x = tl.zeros([BT, BC], tl.float32)
            for o in tl.static_range(N):
                res = gathered(sums_ptr, (2 + o) * N + i, BT)
                res_sum = res_sums[i * N + o] + lane_sums(grads[o] * x, BT, BC, VECTOR)
                next_res_sums = next_res_sums + (res_sum,)
                grad_x += res[:, None] * grads[o]
            tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        res_sums = next_res_sums

    # All threads have read the coefficients.
    tl.debug_barrier()
    for o in tl.static_range(N):
        if SINGLE_PASS:
            store_sum(sums_ptr, o, read_sums[o], BT)
        else:
            store_sum(sums_ptr, o, tl.zeros([BT, 1], tl.float32), BT)
        store_sum(sums_ptr, N + o, post_sums[o], BT)
        for i in tl.static_range(N):
            store_sum(sums_ptr, (2 + o) * N + i, res_sums[i * N + o], BT)


@triton.jit
def store_sum(sums_ptr, row: tl.constexpr, sums, BT: tl.constexpr):
    tl.store(sums_ptr + row * BT + tl.arange(0, BT), tl.sum(sums, axis=1))


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
