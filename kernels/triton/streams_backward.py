"""Backward, second pass: the gradients of streams, branch and previous mappings, read once."""

import triton
import triton.language as tl

from mhc_megatron.kernels.triton.tile_math import (
    channel_mask,
    dot,
    lane_sums,
    load_branch,
    load_coefficients,
    load_radial,
    load_streams,
    load_weight,
    post_mix_stream,
    rounded,
    separate,
    token_rows,
    widened,
    zero_sums,
)


@triton.jit
def load_projected(
    projected_ptr, part: tl.constexpr, tokens, live, T, M: tl.constexpr, MP: tl.constexpr
):
    """One part of the gradient of ``vec(y) phi``, [BT, MP]."""
    m = tl.arange(0, MP)
    pointers = projected_ptr + (part * M + m)[None, :] * T + tokens[:, None]
    return tl.load(pointers, mask=live[:, None] & (m < M)[None, :], other=0.0)


@triton.jit
def projected_product(
    high,
    low,
    weight_rows,
    columns,
    M: tl.constexpr,
    MP: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    WIDTH: tl.constexpr,
    LAST: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``grad_projected @ phi`` on WIDTH columns below LAST, from TERMS products of the parts."""
    present, live = tl.arange(0, MP) < M, columns < LAST
    product = tl.zeros([BT, WIDTH], tl.float32)
    weight = load_weight(weight_rows, columns, live, present)
    product = dot(high, weight, product, PRECISION)
    if TERMS >= 2:
        product = dot(low, weight, product, PRECISION)
    if TERMS == 3:
        weight_low = load_weight(weight_rows + M * K, columns, live, present)
        product = dot(high, weight_low, product, PRECISION)
    return product


@triton.jit
def scaled_rows(rows, factor, ROWS: tl.constexpr):
    """Coefficients of every token, times a number of its own."""
    scaled = ()
    for row in tl.static_range(ROWS):
        scaled = scaled + (rows[row] * factor,)
    return scaled


@triton.jit
def store_sums(base_ptr, sums, first_row, tokens, live, T, ROWS: tl.constexpr):
    for row in tl.static_range(ROWS):
        tl.store(base_ptr + (first_row + row) * T + tokens, tl.sum(sums[row], axis=1), mask=live)


@triton.jit
def streams_bwd(
    grad_y_ptr,
    grad_u_ptr,
    x_ptr,
    branch_ptr,
    branch_bias_ptr,
    packed_ptr,
    next_packed_ptr,
    projected_ptr,
    radial_ptr,
    weight_ptr,
    grad_x_ptr,
    grad_branch_ptr,
    grad_packed_ptr,
    T,
    C: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_GRAD_Y: tl.constexpr,
    HAS_PRE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SINGLE_PASS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Of ``post_pre``, and without HAS_PRE of ``post``.

    The new streams y are built again from x and the branch. SINGLE_PASS took H_pre from ``packed``;
    its gradient goes there, a sum over y as the forward pass rounded it. Else only the division by
    the RMS asks for y, in which rounding makes no difference, and which is one sum with the
    coefficients times ``radial``. INTERLEAVED has phi in the order of ``separate``.
    """
    T = tl.cast(T, tl.int64)
    first, tokens, live = token_rows(T, BT)
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
    post = load_coefficients(packed_ptr, N, tokens, live, T, N)
    res = load_coefficients(packed_ptr, 2 * N, tokens, live, T, N * N)
    post_sums = zero_sums(N, BT, BC // VECTOR)
    res_sums = zero_sums(N * N, BT, BC // VECTOR)
    if HAS_PRE:
        grad_u_ptr += first * C
        read_ptr = packed_ptr if SINGLE_PASS else next_packed_ptr
        read = load_coefficients(read_ptr, 0, tokens, live, T, N)
        radial = load_radial(radial_ptr, tokens, live, T, SINGLE_PASS)
        high = load_projected(projected_ptr, 0, tokens, live, T, M, MP)
        low = high
        if TERMS >= 2:
            low = load_projected(projected_ptr, 1, tokens, live, T, M, MP)
        weight_rows = weight_ptr + tl.arange(0, MP)[:, None] * K
        if not SINGLE_PASS:
            radial_post = scaled_rows(post, radial, N)
            radial_res = scaled_rows(res, radial, N * N)
    if SINGLE_PASS:
        read_sums = zero_sums(N, BT, BC // VECTOR)

    for c in tl.range(0, C, BC, num_stages=STAGES):
        mask = channel_mask(live, c, C, BC)
        x = load_streams(x_ptr + rows, c, mask, N, C, BC, "")
        branch = load_branch(branch_ptr + branch_rows, branch_bias_ptr, c, mask, HAS_BIAS, C, BC)
        grad_branch = tl.zeros([BT, BC], tl.float32)
        if HAS_PRE:
            u_pointers = grad_u_ptr + branch_rows + (c + columns)[None, :]
            grad_u = widened(tl.load(u_pointers, mask=mask, other=0.0))
            if INTERLEAVED:
                products = projected_product(
                    high,
                    low,
                    weight_rows,
                    c * N + tl.arange(0, N * BC),
                    M,
                    MP,
                    K,
                    BT,
                    N * BC,
                    K,
                    TERMS,
                    PRECISION,
                )
                products = separate(products, N, BT, BC)
        grad_x = zero_sums(N, BT, BC)
        next_post_sums = ()
        next_res_sums = ()
        if SINGLE_PASS:
            next_read_sums = ()
        for o in tl.static_range(N):
            grad = tl.zeros([BT, BC], tl.float32)
            if HAS_GRAD_Y:
                grad_y_pointers = grad_y_ptr + rows + (o * C + c + columns)[None, :]
                grad = widened(tl.load(grad_y_pointers, mask=mask, other=0.0))
            if HAS_PRE:
                # three uses of x': raw's product with phi, its division by the RMS, and the read
                if SINGLE_PASS:
                    # x'[o] = sum_i H_res[o, i] x[i] + H_post[o] f
                    y = post_mix_stream(x, branch, post, res, o, N)
                    y = widened(rounded(y, x_ptr.dtype.element_ty))
                    grad = tl.fma(radial[:, None], y, grad)
                else:
                    grad = tl.fma(radial_post[o][:, None], branch, grad)
                    for i in tl.static_range(N):
                        grad = tl.fma(radial_res[o * N + i][:, None], x[i], grad)
                grad = tl.fma(read[o][:, None], grad_u, grad)
                if INTERLEAVED:
                    grad += products[o]
                else:
                    grad += projected_product(
                        high,
                        low,
                        weight_rows,
                        o * C + c + columns,
                        M,
                        MP,
                        K,
                        BT,
                        BC,
                        (o + 1) * C,
                        TERMS,
                        PRECISION,
                    )
                if SINGLE_PASS:
                    read_sum = read_sums[o] + lane_sums(grad_u * y, BT, BC, VECTOR)
                    next_read_sums = next_read_sums + (read_sum,)
            # x'[o] = sum_i H_res[o, i] x[i] + H_post[o] f
            post_sum = post_sums[o] + lane_sums(grad * branch, BT, BC, VECTOR)
            next_post_sums = next_post_sums + (post_sum,)
            for i in tl.static_range(N):
                res_sum = res_sums[o * N + i]
                res_sum += lane_sums(grad * x[i], BT, BC, VECTOR)
                next_res_sums = next_res_sums + (res_sum,)
            grad_branch += post[o][:, None] * grad
            mixed = ()
            for i in tl.static_range(N):
                mixed = mixed + (grad_x[i] + res[o * N + i][:, None] * grad,)
            grad_x = mixed
        for i in tl.static_range(N):
            pointers = grad_x_ptr + rows + (i * C + c + columns)[None, :]
            tl.store(pointers, grad_x[i].to(grad_x_ptr.dtype.element_ty), mask=mask)
        pointers = grad_branch_ptr + branch_rows + (c + columns)[None, :]
        tl.store(pointers, grad_branch.to(grad_branch_ptr.dtype.element_ty), mask=mask)
        post_sums = next_post_sums
        res_sums = next_res_sums
        if SINGLE_PASS:
            read_sums = next_read_sums

    if SINGLE_PASS:
        store_sums(grad_packed_ptr, read_sums, 0, tokens, live, T, N)
    else:
        for row in tl.static_range(N):
            tl.store(grad_packed_ptr + row * T + tokens, tl.zeros([BT], tl.float32), mask=live)
    store_sums(grad_packed_ptr, post_sums, N, tokens, live, T, N)
    store_sums(grad_packed_ptr, res_sums, 2 * N, tokens, live, T, N * N)
