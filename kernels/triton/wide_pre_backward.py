"""pre_backward.py for many streams: larger tiles, of which every product fills a tensor core.

phi's rows are HEAD and up to TAIL more: 80 fill 64 and 16 of a tensor core's product, where all in
one would be padded to 128. What is loaded of the logits' gradient for a tile of tokens is the left
factor of the product with phi, and transposed the right one of that with the streams.
"""

import triton
import triton.language as tl

from mhc_megatron.kernels.triton.tile_math import (
    as_half,
    channel_mask,
    dot,
    interleaved_place,
    load_radial,
    phi_pointers,
    scaled_half,
)


@triton.jit
def load_projected_rows(
    projected_ptr,
    start,
    live,
    T,
    M: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    PARTS: tl.constexpr,
    BT: tl.constexpr,
):
    """The gradient of ``vec(x) phi``, [HEAD, BT] and [TAIL, BT] of every part."""
    tokens = tl.arange(0, BT)[None, :]
    groups = ()
    for part in tl.static_range(PARTS):
        first = projected_ptr + (part * M * T + start)
        rows = tl.arange(0, HEAD)[:, None] * T
        groups = groups + (tl.load(first + rows + tokens, mask=live[None, :], other=0.0),)
        if TAIL > 0:
            rows = tl.arange(0, TAIL)[:, None] * T
            pointers = first + HEAD * T + rows + tokens
            groups = groups + (tl.load(pointers, mask=live[None, :], other=0.0),)
    return groups


@triton.jit
def load_phi_rows(
    weight_ptr,
    columns,
    present,
    M: tl.constexpr,
    K: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    PARTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Columns of phi, [HEAD, BC] and [TAIL, BC] of every part."""
    mask = present[None, :]
    groups = ()
    for part in tl.static_range(PARTS):
        rows = part * M + tl.arange(0, HEAD)[:, None]
        pointers = phi_pointers(weight_ptr, rows, columns[None, :], M, K, TRANSPOSED)
        groups = groups + (tl.load(pointers, mask=mask, other=0.0),)
        if TAIL > 0:
            rows = part * M + HEAD + tl.arange(0, TAIL)[:, None]
            pointers = phi_pointers(weight_ptr, rows, columns[None, :], M, K, TRANSPOSED)
            groups = groups + (tl.load(pointers, mask=mask, other=0.0),)
    return groups


@triton.jit
def add_projected_product(
    grad,
    projected,
    phi,
    GROUPS: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``grad + grad_projected @ phi``, of TERMS products of the parts."""
    for term in tl.static_range(TERMS):
        for group in tl.static_range(GROUPS):
            left = tl.trans(projected[term % 2 * GROUPS + group])
            grad = dot(left, phi[term // 2 * GROUPS + group], grad, PRECISION)
    return grad


@triton.jit
def wide_pre_bwd(
    grad_y_ptr,
    grad_u_ptr,
    x_ptr,
    packed_ptr,
    projected_ptr,
    radial_ptr,
    weight_ptr,
    grad_x_ptr,
    scale_ptr,
    weight_partial_ptr,
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
    SCALED: tl.constexpr,
    SINGLE_PASS: tl.constexpr,
    TRAINS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SPLIT: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """``pre_bwd``; ``weight`` is that of ``split_wide`` where INTERLEAVED.

    With SCALED the gradient is for ``wide_streams_bwd``, whose sums want more bits of it than
    bfloat16 has: ``grad_x`` has it in float16, BC channels of a token by a number of ``scale``,
    [n, C / BC, T].

    Only what a product takes is loaded ahead of its iteration. Products for phi's gradient come
    before those with phi, which are waited for, so that both have ended before the next tiles are
    loaded; see ``pre_bwd``.
    """
    T = tl.cast(T, tl.int64)
    K: tl.constexpr = N * C
    GROUPS: tl.constexpr = 2 if TAIL > 0 else 1
    # Neighbours share the gradient of u, and find it in L2.
    stream = tl.program_id(0) % N
    c = tl.program_id(0) // N * BC
    split = tl.program_id(1).to(tl.int64)
    first = split * SPLIT
    last = tl.minimum(first + SPLIT, T)
    channels = c + tl.arange(0, BC)
    present = channels < C
    columns = stream * C + channels
    rows = tl.arange(0, BT)[:, None]
    numbers = tl.arange(0, BC)[None, :]
    tokens = tl.arange(0, BT)

    phi_columns = interleaved_place(stream, channels, N) if INTERLEAVED else columns
    phi = load_phi_rows(weight_ptr, phi_columns, present, M, K, HEAD, TAIL, PARTS, INTERLEAVED)
    head_sums = tl.zeros([BC, HEAD], tl.float32)
    if TAIL > 0:
        tail_sums = tl.zeros([BC, TAIL], tl.float32)
    for step in tl.range(0, tl.cast(last - first, tl.int32), BT):
        start = first + step
        live = tokens < tl.cast(last - start, tl.int32)
        mask = channel_mask(live, c, C, BC)
        at = start * K + stream * C + c
        # What is added to the products is on its way before the tiles that they take are waited
        # for: behind that, the assembler may have it wait until the products have ended.
        if HAS_GRAD_Y:
            grad_y = tl.load(grad_y_ptr + at + rows * K + numbers, mask=mask, other=0.0)
        read = tl.load(packed_ptr + (stream * T + start) + tokens, mask=live, other=0.0)
        u_pointers = grad_u_ptr + (start * C + c) + rows * C + numbers
        grad_u = tl.load(u_pointers, mask=mask, other=0.0)
        projected = load_projected_rows(projected_ptr, start, live, T, M, HEAD, TAIL, PARTS, BT)
        x = tl.load(x_ptr + at + rows * K + numbers, mask=mask, other=0.0)
        if TRAINS:
            # grad_phi = grad_projected^T vec(x)
            factor = tl.trans(x.to(projected_ptr.dtype.element_ty))
            if TAIL > 0:
                for part in tl.static_range(PARTS):
                    right = tl.trans(projected[part * GROUPS + 1])
                    tail_sums = dot(factor, right, tail_sums, PRECISION)
            for part in tl.static_range(PARTS):
                right = tl.trans(projected[part * GROUPS])
                head_sums = dot(factor, right, head_sums, PRECISION)
        # three uses of x: raw's product with phi, its division by the RMS, and the read
        grad = tl.zeros([BT, BC], tl.float32)
        grad = add_projected_product(grad, projected, phi, GROUPS, TERMS, PRECISION)
        radial = load_radial(radial_ptr + start, tokens, live, T, SINGLE_PASS)
        grad = tl.fma(radial[:, None], x.to(tl.float32), grad)
        # Together, so that one tile goes into the product's layout instead of two.
        given = grad_u.to(tl.float32)
        if HAS_GRAD_Y:
            given = tl.fma(read[:, None], given, grad_y.to(tl.float32))
        else:
            given *= read[:, None]
        grad += given
        places = at + rows * K + numbers
        if SCALED:
            half, scale = scaled_half(grad)
            tl.store(as_half(grad_x_ptr) + places, half, mask=mask)
            row = stream * ((C + BC - 1) // BC) + c // BC
            tl.store(scale_ptr + (row * T + start) + tokens, scale, mask=live)
        else:
            tl.store(grad_x_ptr + places, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if TRAINS:
        if C % BC != 0:
            # Those beyond the stream are another's.
            columns = tl.where(present, columns, K)
        store_weight_columns(weight_partial_ptr, split, head_sums, 0, columns, K, M, HEAD)
        if TAIL > 0:
            store_weight_columns(weight_partial_ptr, split, tail_sums, HEAD, columns, K, M, TAIL)


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
