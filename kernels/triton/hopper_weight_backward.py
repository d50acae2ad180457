"""``weight_bwd`` on Hopper: phi's gradient of ``post_pre`` (Gluon).

Products of the streams with the logits' gradient, and nothing else: a program has as many columns
of phi as its sums have registers for, so that the logits' gradient is read seldom.
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

from mhc_megatron.kernels.triton.hopper_pre_backward import copy_projected, store_columns
from mhc_megatron.kernels.triton.hopper_tiles import barrier, copy_states, product, shared


@gluon.jit
def copy_step(
    ys,
    heads,
    tails,
    step,
    steps,
    y_ptr,
    projected_ptr,
    first,
    last,
    column,
    T,
    K: gl.constexpr,
    M: gl.constexpr,
    HEAD: gl.constexpr,
    TAIL: gl.constexpr,
    BT: gl.constexpr,
    BC: gl.constexpr,
    STAGES: gl.constexpr,
    W: gl.constexpr,
):
    """What the tokens of a step need, if there is one: one group of copies in any case."""
    LAST: gl.constexpr = HEAD if HEAD < M else M
    if step < steps:
        at = step % STAGES
        start = first + step * BT
        live = last - start
        copy_projected(heads.index(at), projected_ptr, start, live, T, 0, LAST, M, HEAD, BT, W)
        if TAIL > 0:
            copy_projected(tails.index(at), projected_ptr, start, live, T, HEAD, M, M, TAIL, BT, W)
        base = y_ptr + start.to(gl.int64) * K + column
        copy_states(ys.index(at), base, K, live, K - column, BT, BC, W)
    async_copy.commit_group()


@gluon.jit
def hopper_weight_bwd(
    y_ptr,
    projected_ptr,
    partial_ptr,
    T,
    K: gl.constexpr,
    M: gl.constexpr,
    HEAD: gl.constexpr,
    TAIL: gl.constexpr,
    SPLIT: gl.constexpr,
    BT: gl.constexpr,
    BC: gl.constexpr,
    STAGES: gl.constexpr,
):
    """``weight_bwd`` of SPLIT tokens and BC columns."""
    W: gl.constexpr = gl.num_warps()
    bf16: gl.constexpr = gl.bfloat16
    column = gl.program_id(0) * BC
    first = gl.program_id(1) * SPLIT
    last = gl.minimum(first + SPLIT, T)
    steps = (last - first + BT - 1) // BT
    HEAD_SUMS: gl.constexpr = product(BC, 2 * HEAD, W)
    ys = gl.allocate_shared_memory(bf16, [STAGES, BT, BC], shared(BC))
    heads = gl.allocate_shared_memory(bf16, [STAGES, 2 * HEAD, BT], shared(BT))
    head = warpgroup_mma_init(gl.zeros([BC, 2 * HEAD], gl.float32, layout=HEAD_SUMS))
    tails = None
    if TAIL > 0:
        TAIL_SUMS: gl.constexpr = product(BC, 2 * TAIL, W)
        tails = gl.allocate_shared_memory(bf16, [STAGES, 2 * TAIL, BT], shared(BT))
        tail = warpgroup_mma_init(gl.zeros([BC, 2 * TAIL], gl.float32, layout=TAIL_SUMS))
    for step in gl.static_range(STAGES - 1):
        copy_step(
            ys,
            heads,
            tails,
            step,
            steps,
            y_ptr,
            projected_ptr,
            first,
            last,
            column,
            T,
            K,
            M,
            HEAD,
            TAIL,
            BT,
            BC,
            STAGES,
            W,
        )
    for number in range(steps):
        at = number % STAGES
        # The products of the step before have ended: its places may be written.
        if TAIL > 0:
            head, tail = warpgroup_mma_wait(num_outstanding=0, deps=(head, tail))
        else:
            head = warpgroup_mma_wait(num_outstanding=0, deps=(head,))
        async_copy.wait_group(STAGES - 2)
        barrier()
        fence_async_shared()
        factor = ys.index(at).permute((1, 0))
        head = warpgroup_mma(factor, heads.index(at).permute((1, 0)), head, is_async=True)
        if TAIL > 0:
            tail = warpgroup_mma(factor, tails.index(at).permute((1, 0)), tail, is_async=True)
        copy_step(
            ys,
            heads,
            tails,
            number + STAGES - 1,
            steps,
            y_ptr,
            projected_ptr,
            first,
            last,
            column,
            T,
            K,
            M,
            HEAD,
            TAIL,
            BT,
            BC,
            STAGES,
            W,
        )
    split = gl.program_id(1).to(gl.int64)
    if TAIL > 0:
        head, tail = warpgroup_mma_wait(num_outstanding=0, deps=(head, tail))
    else:
        head = warpgroup_mma_wait(num_outstanding=0, deps=(head,))
    store_columns(partial_ptr, split, head, 0, 0, column, K, 1, M, HEAD, BC, product(BC, HEAD, W))
    if TAIL > 0:
        store_columns(
            partial_ptr, split, tail, HEAD, 0, column, K, 1, M, TAIL, BC, product(BC, TAIL, W)
        )
