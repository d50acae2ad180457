"""The first half of ``mix_fwd`` on Hopper, with layouts and waits by name (Gluon).

``mix_fwd`` walks through the channels of 32 tokens twice; what stands between both walks, and each
product within one, keeps its next loads waiting. Here a program walks once, and what a chunk of
channels needs is copied to shared memory several chunks ahead. It makes the new streams, which
take the place of the old ones there and are multiplied while the next chunk is mixed, and leaves
the products with phi and the sums of squares to ``read_fwd``: that adds them up, makes the
mappings, and reads the streams for u.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from mhc_megatron.kernels.triton.hopper_tiles import (
    barrier,
    copy_states,
    loads,
    product,
    shared,
)
from mhc_megatron.kernels.triton.tile_math import (
    load_coefficients,
    post_mix_stream,
    rounded,
    widened,
    with_bias,
)


@gluon.jit
def copy_chunk(
    xs,
    fs,
    phis,
    step,
    steps,
    x_ptr,
    branch_ptr,
    chunks_ptr,
    start,
    live,
    C: gl.constexpr,
    N: gl.constexpr,
    M: gl.constexpr,
    ROWS: gl.constexpr,
    HAS_POST: gl.constexpr,
    BT: gl.constexpr,
    BC: gl.constexpr,
    STAGES: gl.constexpr,
    W: gl.constexpr,
):
    """A step's channels of the program's tokens, if there are some, and ``split_weight``'s chunk of
    phi for them, [2 ROWS, N * BC]: one group of copies in any case, as they are counted."""
    if step < steps:
        at = step % STAGES
        c = start + step * BC
        left = C - c
        LAYOUT: gl.constexpr = loads(N * BC, W)
        rows = gl.arange(0, 2 * ROWS, layout=gl.SliceLayout(1, LAYOUT))
        columns = gl.arange(0, N * BC, layout=gl.SliceLayout(0, LAYOUT))
        pointers = chunks_ptr + c * (2 * ROWS * N) + rows[:, None] * (N * BC) + columns[None, :]
        mask = (rows % ROWS < M)[:, None] & (columns % BC < left)[None, :]
        async_copy.async_copy_global_to_shared(phis.index(at), pointers, mask=mask)
        for i in gl.static_range(N):
            copy_states(xs[i].index(at), x_ptr + i * C + c, N * C, live, left, BT, BC, W)
        if HAS_POST:
            copy_states(fs.index(at), branch_ptr + c, C, live, left, BT, BC, W)
    async_copy.commit_group()


@gluon.jit
def add_products(projected, xs, phis, at, N: gl.constexpr, BC: gl.constexpr):
    """Of one chunk's new streams with both parts of phi, left running."""
    for o in gl.static_range(N):
        phi = phis.index(at).slice(o * BC, BC, 1)
        projected = warpgroup_mma(phi, xs[o].index(at).permute((1, 0)), projected, is_async=True)
    return projected


@gluon.jit
def hopper_mix_fwd(
    x_ptr,
    branch_ptr,
    branch_bias_ptr,
    packed_ptr,
    chunks_ptr,
    y_ptr,
    u_ptr,
    sums_ptr,
    T,
    C: gl.constexpr,
    N: gl.constexpr,
    M: gl.constexpr,
    ROWS: gl.constexpr,
    HAS_POST: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SINGLE_PASS: gl.constexpr,
    SPAN: gl.constexpr,
    BT: gl.constexpr,
    BC: gl.constexpr,
    STAGES: gl.constexpr,
):
    """``post`` of BT tokens and SPAN channels, if it HAS_POST, and what ``read_fwd`` adds up.

    ``chunks``: of ``split_weight``, in chunks of BC channels; the ROWS of both parts are 64.
    ``sums``: [programs, 2 M + 1, BT], ``vec(y) phi`` by part and the sum of the squares of y.
    SINGLE_PASS mixes u by the mappings that write.
    """
    W: gl.constexpr = gl.num_warps()
    # L2 is kept for what ``read_fwd`` reads again.
    Y_EVICTION: gl.constexpr = "" if SINGLE_PASS else "evict_last"
    bf16: gl.constexpr = gl.bfloat16
    K: gl.constexpr = N * C
    SPLITS: gl.constexpr = (C + SPAN - 1) // SPAN
    first = (gl.program_id(0) // SPLITS).to(gl.int64) * BT
    start = gl.program_id(0) % SPLITS * SPAN
    steps = (gl.minimum(start + SPAN, C) - start + BC - 1) // BC
    live = (T - first).to(gl.int32)
    STATE: gl.constexpr = loads(BC, W)
    SUMS: gl.constexpr = product(2 * ROWS, BT, W)
    x_ptr += first * K
    if HAS_POST:
        y_ptr += first * K
        branch_ptr += first * C
    if SINGLE_PASS:
        u_ptr += first * C
    xs = ()
    for _ in gl.static_range(N):
        xs = xs + (gl.allocate_shared_memory(bf16, [STAGES, BT, BC], shared(BC)),)
    phis = gl.allocate_shared_memory(bf16, [STAGES, 2 * ROWS, N * BC], shared(N * BC))
    fs = None
    if HAS_POST:
        fs = gl.allocate_shared_memory(bf16, [STAGES, BT, BC], shared(BC))
    tokens = gl.arange(0, BT, layout=gl.SliceLayout(1, STATE))
    channels = gl.arange(0, BC, layout=gl.SliceLayout(0, STATE))
    here = tokens < live
    if HAS_POST:
        post = load_coefficients(packed_ptr + first, N, tokens, here, T, N)
        res = load_coefficients(packed_ptr + first, 2 * N, tokens, here, T, N * N)
    if SINGLE_PASS:
        read = load_coefficients(packed_ptr + first, 0, tokens, here, T, N)
    projected = warpgroup_mma_init(gl.zeros([2 * ROWS, BT], gl.float32, layout=SUMS))
    squares = gl.zeros([BT, BC], gl.float32, layout=STATE)

    for step in gl.static_range(STAGES - 1):
        copy_chunk(
            xs,
            fs,
            phis,
            step,
            steps,
            x_ptr,
            branch_ptr,
            chunks_ptr,
            start,
            live,
            C,
            N,
            M,
            ROWS,
            HAS_POST,
            BT,
            BC,
            STAGES,
            W,
        )
    for number in range(steps):
        c = start + number * BC
        at = number % STAGES
        async_copy.wait_group(STAGES - 2)
        if not HAS_POST:
            # The products of the chunk before have ended: its places may be written.
            projected = warpgroup_mma_wait(num_outstanding=0, deps=(projected,))
        fence_async_shared()
        barrier()
        if not HAS_POST:
            projected = add_products(projected, xs, phis, at, N, BC)
        mask = here[:, None] & (channels < C - c)[None, :]
        places = c + tokens[:, None] * K + channels[None, :]
        if HAS_POST:
            f = fs.index(at).load(STATE)
            f = with_bias(f, branch_bias_ptr, c + channels, HAS_BIAS, C)
            old = ()
            for i in gl.static_range(N):
                old = old + (widened(xs[i].index(at).load(STATE)),)
        if SINGLE_PASS:
            u = gl.zeros([BT, BC], gl.float32, layout=STATE)
        for o in gl.static_range(N):
            if HAS_POST:
                y = rounded(post_mix_stream(old, f, post, res, o, N), bf16)
                gl.store(y_ptr + o * C + places, y, mask=mask, eviction_policy=Y_EVICTION)
                xs[o].index(at).store(y)
                wide = widened(y)
            else:
                wide = widened(xs[o].index(at).load(STATE))
            squares += wide * wide
            if SINGLE_PASS:
                u = gl.fma(read[o][:, None], wide, u)
        if SINGLE_PASS:
            gl.store(
                u_ptr + c + tokens[:, None] * C + channels[None, :], rounded(u, bf16), mask=mask
            )
        if HAS_POST:
            projected = warpgroup_mma_wait(num_outstanding=0, deps=(projected,))
            fence_async_shared()
            barrier()
            projected = add_products(projected, xs, phis, at, N, BC)
        copy_chunk(
            xs,
            fs,
            phis,
            number + STAGES - 1,
            steps,
            x_ptr,
            branch_ptr,
            chunks_ptr,
            start,
            live,
            C,
            N,
            M,
            ROWS,
            HAS_POST,
            BT,
            BC,
            STAGES,
            W,
        )
    projected = warpgroup_mma_wait(num_outstanding=0, deps=(projected,))
    rows = gl.arange(0, 2 * ROWS, layout=gl.SliceLayout(1, SUMS))
    columns = gl.arange(0, BT, layout=gl.SliceLayout(0, SUMS))
    out = sums_ptr + gl.program_id(0).to(gl.int64) * ((2 * M + 1) * BT)
    m = rows % ROWS
    gl.store(
        out + (rows // ROWS * M + m)[:, None] * BT + columns[None, :],
        projected,
        mask=(m < M)[:, None],
    )
    gl.store(out + 2 * M * BT + tokens, gl.sum(squares, axis=1))
