"""``pre_bwd`` and ``wide_pre_bwd`` on Hopper, with layouts and waits by name (Gluon).

The same sums of the same products as in pre_backward.py and wide_pre_backward.py. What a tile needs
is copied to shared memory a step ahead, in the order in which tensor cores read it; all products of
a step run beside each other and beside what is added to them, which is read in the layout of their
results (``in_order``), so that nothing changes its layout. Triton by itself waits for nearly every
product, and brings every tile into the layout of the products and back by way of shared memory,
between barriers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mhc_megatron.kernels.triton.hopper_tiles import (
    barrier,
    copy_states,
    halves,
    in_order,
    interchanged,
    loads,
    ordered,
    product,
    shared,
)
from mhc_megatron.kernels.triton.tile_math import as_half, interleaved_place, scaled_half


@gluon.jit
def copy_projected(
    place,
    projected_ptr,
    start,
    live,
    T,
    first: gl.constexpr,
    LAST: gl.constexpr,
    M: gl.constexpr,
    ROWS: gl.constexpr,
    BT: gl.constexpr,
    W: gl.constexpr,
):
    """ROWS of each part of the gradient of ``vec(x) phi``, one below the other: [2 ROWS, BT]."""
    LAYOUT: gl.constexpr = loads(BT, W)
    numbers = gl.arange(0, 2 * ROWS, layout=gl.SliceLayout(1, LAYOUT))
    tokens = gl.arange(0, BT, layout=gl.SliceLayout(0, LAYOUT))
    rows = first + numbers % ROWS
    pointers = projected_ptr + start + (numbers // ROWS * M + rows)[:, None] * T + tokens[None, :]
    mask = (rows < LAST)[:, None] & (tokens < live)[None, :]
    async_copy.async_copy_global_to_shared(place, pointers, mask=mask)


@gluon.jit
def load_phi(
    place,
    weight_ptr,
    stream,
    c,
    part: gl.constexpr,
    first: gl.constexpr,
    LAST: gl.constexpr,
    C: gl.constexpr,
    N: gl.constexpr,
    M: gl.constexpr,
    ROWS: gl.constexpr,
    BC: gl.constexpr,
    WIDE: gl.constexpr,
    W: gl.constexpr,
):
    """ROWS of phi's ``interchanged`` columns: [BC, ROWS] of ``split_wide``, else [ROWS, BC]."""
    if WIDE:
        LAYOUT: gl.constexpr = loads(ROWS, W)
        places = gl.arange(0, BC, layout=gl.SliceLayout(1, LAYOUT))
        channels = c + places // 32 * 32 + places // 2 % 4 * 8 + places // 8 % 4 * 2 + places % 2
        rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(0, LAYOUT))
        columns = interleaved_place(stream, channels, N)
        pointers = weight_ptr + part * M + columns[:, None] * (2 * M) + rows[None, :]
        mask = (channels < C)[:, None] & (rows < LAST)[None, :]
        place.store(gl.load(pointers, mask=mask, other=0.0))
    else:
        LAYOUT: gl.constexpr = loads(BC, W)
        rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
        channels = c + gl.arange(0, BC, layout=gl.SliceLayout(0, LAYOUT))
        columns = interleaved_place(stream, channels, N)
        pointers = weight_ptr + part * M * (N * C) + rows[:, None] * (N * C) + columns[None, :]
        mask = (rows < LAST)[:, None] & (channels < C)[None, :]
        place.store(interchanged(gl.load(pointers, mask=mask, other=0.0)))


@gluon.jit
def add_product(
    grad,
    projected,
    phi_high,
    phi_low,
    TERMS: gl.constexpr,
    WIDE: gl.constexpr,
    FIRST: gl.constexpr,
    ROWS: gl.constexpr,
):
    """``grad + grad_projected @ phi`` of one group of rows, left running."""
    high = projected.slice(0, ROWS).permute((1, 0))
    low = projected.slice(ROWS, ROWS).permute((1, 0))
    if WIDE:
        phi_high = phi_high.permute((1, 0))
        phi_low = phi_low.permute((1, 0))
    grad = warpgroup_mma(high, phi_high, grad, use_acc=not FIRST, is_async=True)
    if TERMS >= 2:
        grad = warpgroup_mma(low, phi_high, grad, is_async=True)
    if TERMS >= 3:
        grad = warpgroup_mma(high, phi_low, grad, is_async=True)
    return grad


@gluon.jit
def hopper_pre_bwd(
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
    C: gl.constexpr,
    N: gl.constexpr,
    M: gl.constexpr,
    HEAD: gl.constexpr,
    TAIL: gl.constexpr,
    TERMS: gl.constexpr,
    HAS_GRAD_Y: gl.constexpr,
    SCALED: gl.constexpr,
    SINGLE_PASS: gl.constexpr,
    TRAINS: gl.constexpr,
    WIDE: gl.constexpr,
    SPLIT: gl.constexpr,
    BT: gl.constexpr,
    BC: gl.constexpr,
    STAGES: gl.constexpr,
):
    """``pre_bwd`` of SPLIT tokens and BC channels of a stream; ``weight`` is that of ``split_wide``
    where WIDE, and with SCALED the result as of ``wide_pre_bwd``."""
    K: gl.constexpr = N * C
    W: gl.constexpr = gl.num_warps()
    bf16: gl.constexpr = gl.bfloat16
    stream = gl.program_id(0) % N
    c = gl.program_id(0) // N * BC
    left = C - c
    first = gl.program_id(1) * SPLIT
    last = gl.minimum(first + SPLIT, T)
    steps = (last - first + BT - 1) // BT
    GRAD: gl.constexpr = product(BT, BC, W)
    HEAD_SUMS: gl.constexpr = product(BC, 2 * HEAD, W)
    ORDER: gl.constexpr = ordered(BT, BC, W)

    xs = gl.allocate_shared_memory(bf16, [STAGES, BT, BC], shared(BC))
    us = gl.allocate_shared_memory(bf16, [STAGES, BT, BC], halves(BC))
    ys = None
    if HAS_GRAD_Y:
        ys = gl.allocate_shared_memory(bf16, [STAGES, BT, BC], halves(BC))
    heads = gl.allocate_shared_memory(bf16, [STAGES, 2 * HEAD, BT], shared(BT))
    tails = None
    if TAIL > 0:
        tails = gl.allocate_shared_memory(bf16, [STAGES, 2 * TAIL, BT], shared(BT))
    if WIDE:
        phi_high = gl.allocate_shared_memory(bf16, [BC, HEAD], shared(HEAD))
        phi_low = gl.allocate_shared_memory(bf16, [BC, HEAD], shared(HEAD))
    else:
        phi_high = gl.allocate_shared_memory(bf16, [HEAD, BC], shared(BC))
        phi_low = gl.allocate_shared_memory(bf16, [HEAD, BC], shared(BC))
    LAST_HEAD: gl.constexpr = HEAD if HEAD < M else M
    load_phi(phi_high, weight_ptr, stream, c, 0, 0, LAST_HEAD, C, N, M, HEAD, BC, WIDE, W)
    load_phi(phi_low, weight_ptr, stream, c, 1, 0, LAST_HEAD, C, N, M, HEAD, BC, WIDE, W)
    if TAIL > 0:
        tail_high = gl.allocate_shared_memory(bf16, [BC, TAIL], shared(TAIL))
        tail_low = gl.allocate_shared_memory(bf16, [BC, TAIL], shared(TAIL))
        load_phi(tail_high, weight_ptr, stream, c, 0, HEAD, M, C, N, M, TAIL, BC, WIDE, W)
        load_phi(tail_low, weight_ptr, stream, c, 1, HEAD, M, C, N, M, TAIL, BC, WIDE, W)

    head_sums = gl.zeros([BC, 2 * HEAD], gl.float32, layout=HEAD_SUMS)
    if TAIL > 0:
        TAIL_SUMS: gl.constexpr = product(BC, 2 * TAIL, W)
        tail_sums = gl.zeros([BC, 2 * TAIL], gl.float32, layout=TAIL_SUMS)
    zero = gl.zeros([BT, BC], gl.float32, layout=GRAD)
    tokens = gl.arange(0, BT, layout=gl.SliceLayout(1, ORDER))
    channels = gl.arange(0, BC, layout=gl.SliceLayout(0, ORDER))

    for step in gl.static_range(STAGES - 1):
        copy_step(
            xs,
            us,
            ys,
            heads,
            tails,
            step,
            steps,
            grad_y_ptr,
            grad_u_ptr,
            x_ptr,
            projected_ptr,
            first,
            last,
            stream,
            c,
            T,
            C,
            N,
            M,
            HEAD,
            TAIL,
            HAS_GRAD_Y,
            BT,
            BC,
            STAGES,
            W,
        )
    for number in range(steps):
        start = first + number * BT
        at = number % STAGES
        live = last - start
        here = tokens < live
        read = gl.load(packed_ptr + stream * T + start + tokens, mask=here, other=0.0)
        radial = gl.load(radial_ptr + start + tokens, mask=here, other=0.0)
        if not SINGLE_PASS:
            radial += gl.load(radial_ptr + T + start + tokens, mask=here, other=0.0)
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        barrier()
        head = heads.index(at)
        grad = add_product(zero, head, phi_high, phi_low, TERMS, WIDE, True, HEAD)
        if TAIL > 0:
            tail = tails.index(at)
            grad = add_product(grad, tail, tail_high, tail_low, TERMS, WIDE, False, TAIL)
        if TRAINS:
            # grad_phi = grad_projected^T vec(x)
            factor = xs.index(at).permute((1, 0))
            head_sums = warpgroup_mma(factor, head.permute((1, 0)), head_sums, is_async=True)
            if TAIL > 0:
                tail_sums = warpgroup_mma(factor, tail.permute((1, 0)), tail_sums, is_async=True)
        # Where these go all products of the step before have been waited for.
        copy_step(
            xs,
            us,
            ys,
            heads,
            tails,
            number + STAGES - 1,
            steps,
            grad_y_ptr,
            grad_u_ptr,
            x_ptr,
            projected_ptr,
            first,
            last,
            stream,
            c,
            T,
            C,
            N,
            M,
            HEAD,
            TAIL,
            HAS_GRAD_Y,
            BT,
            BC,
            STAGES,
            W,
        )
        # three uses of x: raw's product with phi, its division by the RMS, and the read
        if HAS_GRAD_Y:
            given = ys.index(at).load(ORDER).to(gl.float32)
            given += read[:, None] * us.index(at).load(ORDER).to(gl.float32)
        else:
            given = read[:, None] * us.index(at).load(ORDER).to(gl.float32)
        given += radial[:, None] * xs.index(at).load(ORDER).to(gl.float32)
        RUNNING: gl.constexpr = 0 if not TRAINS else (2 if TAIL > 0 else 1)
        grad = warpgroup_mma_wait(num_outstanding=RUNNING, deps=(grad,))
        grad = in_order(grad, ORDER) + given
        if SCALED:
            value, scale = scaled_half(grad)
            row = stream * ((C + BC - 1) // BC) + c // BC
            gl.store(scale_ptr + row.to(gl.int64) * T + start + tokens, scale, mask=here)
        else:
            value = grad.to(bf16)
        mask = here[:, None] & (channels < left)[None, :]
        result_ptr = as_half(grad_x_ptr) if SCALED else grad_x_ptr
        base = result_ptr + start.to(gl.int64) * K + stream * C + c
        gl.store(base + tokens[:, None] * K + channels[None, :], value, mask=mask)
        if TRAINS:
            if TAIL > 0:
                head_sums, tail_sums = warpgroup_mma_wait(
                    num_outstanding=0, deps=(head_sums, tail_sums)
                )
            else:
                head_sums = warpgroup_mma_wait(num_outstanding=0, deps=(head_sums,))
    if TRAINS:
        split = gl.program_id(1).to(gl.int64)
        store_columns(
            weight_partial_ptr,
            split,
            head_sums,
            0,
            stream,
            c,
            C,
            N,
            M,
            HEAD,
            BC,
            product(BC, HEAD, W),
        )
        if TAIL > 0:
            store_columns(
                weight_partial_ptr,
                split,
                tail_sums,
                HEAD,
                stream,
                c,
                C,
                N,
                M,
                TAIL,
                BC,
                product(BC, TAIL, W),
            )


@gluon.jit
def store_columns(
    partial_ptr,
    split,
    sums,
    first: gl.constexpr,
    stream,
    c,
    C: gl.constexpr,
    N: gl.constexpr,
    M: gl.constexpr,
    ROWS: gl.constexpr,
    BC: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """The parts of a sum [BC, 2 ROWS] together, into ``partial`` [splits, M, n * C]."""
    together = gl.sum(gl.reshape(sums, [BC, 2, ROWS]), axis=1)
    sums = gl.convert_layout(together, LAYOUT)
    channels = c + gl.arange(0, BC, layout=gl.SliceLayout(1, LAYOUT))
    rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(0, LAYOUT))
    pointers = (
        partial_ptr + (split * M + rows)[None, :] * (N * C) + (stream * C + channels)[:, None]
    )
    gl.store(pointers, sums, mask=(channels < C)[:, None] & (rows < M)[None, :])


@gluon.jit
def copy_step(
    xs,
    us,
    ys,
    heads,
    tails,
    step,
    steps,
    grad_y_ptr,
    grad_u_ptr,
    x_ptr,
    projected_ptr,
    first,
    last,
    stream,
    c,
    T,
    C: gl.constexpr,
    N: gl.constexpr,
    M: gl.constexpr,
    HEAD: gl.constexpr,
    TAIL: gl.constexpr,
    HAS_GRAD_Y: gl.constexpr,
    BT: gl.constexpr,
    BC: gl.constexpr,
    STAGES: gl.constexpr,
    W: gl.constexpr,
):
    """What the tokens of a step need, if there is one, to its place in shared memory: one group of
    copies in any case, as they are counted."""
    K: gl.constexpr = N * C
    LAST: gl.constexpr = HEAD if HEAD < M else M
    if step < steps:
        at = step % STAGES
        start = first + step * BT
        live = last - start
        left = C - c
        token = start.to(gl.int64)
        copy_projected(heads.index(at), projected_ptr, start, live, T, 0, LAST, M, HEAD, BT, W)
        if TAIL > 0:
            copy_projected(tails.index(at), projected_ptr, start, live, T, HEAD, M, M, TAIL, BT, W)
        copy_states(xs.index(at), x_ptr + token * K + stream * C + c, K, live, left, BT, BC, W)
        if HAS_GRAD_Y:
            base = grad_y_ptr + token * K + stream * C + c
            copy_states(ys.index(at), base, K, live, left, BT, BC, W)
        copy_states(us.index(at), grad_u_ptr + token * C + c, C, live, left, BT, BC, W)
    async_copy.commit_group()
