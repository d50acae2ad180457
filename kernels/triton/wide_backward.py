"""Backward of ``post`` of many streams: as streams_backward.py, in tiles that hold their sums.

A warp has one token: its n (n + 1) coefficients and as many sums fill the registers, so that the
streams wait in shared memory for their use. What reads the new streams is the work of
wide_pre_backward.py, which leaves the whole gradient of the new streams to this.
"""

import triton
import triton.language as tl

from mhc_megatron.kernels.triton.tile_math import (
    as_half,
    channel_mask,
    lane_sums,
    load_coefficients,
    load_streams,
    token_rows,
    widened,
    with_bias,
    zero_sums,
)


@triton.jit
def load_scales(
    scale_ptr,
    o: tl.constexpr,
    c,
    tokens,
    live,
    T,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """Of a chunk of stream o, [BT, BC]: a number for WIDTH channels."""
    ROWS: tl.constexpr = (C + WIDTH - 1) // WIDTH
    columns = tl.arange(0, BC)[None, :]
    scales = tl.zeros([BT, BC], tl.float32)
    for piece in tl.static_range((BC + WIDTH - 1) // WIDTH):
        row = c // WIDTH + piece
        pointers = scale_ptr + (o * ROWS + row) * T + tokens
        scale = tl.load(pointers, mask=live & (row < ROWS), other=0.0)
        scales = tl.where(columns // WIDTH == piece, scale[:, None], scales)
    return scales


@triton.jit
def wide_streams_bwd(
    grad_y_ptr,
    scale_ptr,
    grad_u_ptr,
    x_ptr,
    y_ptr,
    branch_ptr,
    branch_bias_ptr,
    packed_ptr,
    grad_x_ptr,
    grad_branch_ptr,
    grad_packed_ptr,
    T,
    C: tl.constexpr,
    N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    SINGLE_PASS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of the streams, the branch and the mappings of BT tokens.

    ``grad_y``: of the new streams; with WIDTH float16, of which WIDTH channels of a token are to be
    multiplied by a number of ``scale``, [n, C / WIDTH, T]. ``grad_x`` may be its memory: a chunk is
    written when all of it has been read.
    SINGLE_PASS: the mappings also read the new streams, y, and ``grad_u`` is of what they read.
    """
    T = tl.cast(T, tl.int64)
    first, tokens, live = token_rows(T, BT)
    K: tl.constexpr = N * C
    rows = tl.arange(0, BT)[:, None] * K
    branch_rows = tl.arange(0, BT)[:, None] * C
    columns = tl.arange(0, BC)
    x_ptr += first * K
    grad_x_ptr += first * K
    grad_y_ptr += first * K
    if WIDTH > 0:
        grad_y_ptr = as_half(grad_y_ptr)
    branch_ptr += first * C
    grad_branch_ptr += first * C
    post_sums = zero_sums(N, BT, BC // VECTOR)
    # Of ``res[o, i]`` in place i * n + o.
    res_sums = zero_sums(N * N, BT, BC // VECTOR)
    if SINGLE_PASS:
        y_ptr += first * K
        grad_u_ptr += first * C
        read_sums = zero_sums(N, BT, BC // VECTOR)

    post = load_coefficients(packed_ptr, N, tokens, live, T, N)
    res = load_coefficients(packed_ptr, 2 * N, tokens, live, T, N * N)

    for c in tl.range(0, C, BC, num_stages=STAGES):
        mask = channel_mask(live, c, C, BC)
        f_pointers = branch_ptr + branch_rows + (c + columns)[None, :]
        branch = tl.load(f_pointers, mask=mask, other=0.0)
        branch = with_bias(branch, branch_bias_ptr, c + columns, HAS_BIAS, C)
        # All of the chunk is on its way before the first number is used.
        xs = ()
        given = ()
        scales = ()
        for o in tl.static_range(N):
            offsets = rows + (o * C + c + columns)[None, :]
            xs = xs + (tl.load(x_ptr + offsets, mask=mask, other=0.0),)
            given = given + (tl.load(grad_y_ptr + offsets, mask=mask, other=0.0),)
            if WIDTH > 0:
                scale = load_scales(scale_ptr, o, c, tokens, live, T, C, WIDTH, BT, BC)
                scales = scales + (scale,)
        if SINGLE_PASS:
            u_pointers = grad_u_ptr + branch_rows + (c + columns)[None, :]
            grad_u = widened(tl.load(u_pointers, mask=mask, other=0.0))
            ys = load_streams(y_ptr + rows, c, mask, N, C, BC, "")
        grad_branch = tl.zeros([BT, BC], tl.float32)
        grads = ()
        next_post_sums = ()
        for o in tl.static_range(N):
            grad = widened(given[o])
            if WIDTH > 0:
                grad *= scales[o]
            # x'[o] = sum_i H_res[o, i] x[i] + H_post[o] f
            post_sum = post_sums[o] + lane_sums(grad * branch, BT, BC, VECTOR)
            next_post_sums = next_post_sums + (post_sum,)
            grad_branch += post[o][:, None] * grad
            grads = grads + (grad,)
        post_sums = next_post_sums
        pointers = grad_branch_ptr + branch_rows + (c + columns)[None, :]
        tl.store(pointers, grad_branch.to(grad_branch_ptr.dtype.element_ty), mask=mask)
        if SINGLE_PASS:
            next_read_sums = ()
            for i in tl.static_range(N):
                read_sum = read_sums[i] + lane_sums(grad_u * ys[i], BT, BC, VECTOR)
                next_read_sums = next_read_sums + (read_sum,)
            read_sums = next_read_sums
        next_res_sums = ()
        for i in tl.static_range(N):
            offsets = rows + (i * C + c + columns)[None, :]
            x = widened(xs[i])
            grad_x = tl.zeros([BT, BC], tl.float32)
            for o in tl.static_range(N):
                res_sum = res_sums[i * N + o] + lane_sums(grads[o] * x, BT, BC, VECTOR)
                next_res_sums = next_res_sums + (res_sum,)
                grad_x += res[o * N + i][:, None] * grads[o]
            tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        res_sums = next_res_sums

    for o in tl.static_range(N):
        if SINGLE_PASS:
            store_sum(grad_packed_ptr, o, read_sums[o], tokens, live, T)
        else:
            store_sum(grad_packed_ptr, o, tl.zeros([BT, 1], tl.float32), tokens, live, T)
        store_sum(grad_packed_ptr, N + o, post_sums[o], tokens, live, T)
        for i in tl.static_range(N):
            store_sum(grad_packed_ptr, (2 + o) * N + i, res_sums[i * N + o], tokens, live, T)


@triton.jit
def store_sum(grad_packed_ptr, row: tl.constexpr, sums, tokens, live, T):
    tl.store(grad_packed_ptr + row * T + tokens, tl.sum(sums, axis=1), mask=live)
