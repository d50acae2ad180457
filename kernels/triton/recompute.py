"""The states inside a block of sublayers, walked through with the residual on chip."""

import triton
import triton.language as tl

from mhc_megatron.kernels.triton.tile_math import (
    channel_mask,
    load_branch,
    load_coefficients,
    load_streams,
    post_mix_stream,
    token_rows,
)


@triton.jit
def rebuild_fwd(
    x_ptr,
    branch_ptrs,
    branch_bias_ptrs,
    packed_ptrs,
    y_ptrs,
    u_ptrs,
    T,
    C: tl.constexpr,
    N: tl.constexpr,
    READS: tl.constexpr,
    WRITES: tl.constexpr,
    BIASES: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """Of BT tokens and BC channels, u of READS sublayers, and the streams after WRITES of them.

    ``packed_ptrs`` and ``u_ptrs`` have READS entries; ``branch_ptrs``, ``branch_bias_ptrs`` and
    ``y_ptrs`` WRITES, which is as many or one less. BIASES has a bit for each branch with a bias;
    of the others the entry is None. Given the coefficients no channel needs another, so the state
    never leaves the registers; it is rounded to the streams' dtype between sublayers, as
    ``mix_fwd`` stores and reads it.
    """
    T = tl.cast(T, tl.int64)
    first, tokens, live = token_rows(T, BT)
    c = tl.program_id(1) * BC
    mask = channel_mask(live, c, C, BC)
    rows = first * (N * C) + tl.arange(0, BT)[:, None] * (N * C)
    branch_rows = first * C + tl.arange(0, BT)[:, None] * C
    channels = (c + tl.arange(0, BC))[None, :]
    dtype = x_ptr.dtype.element_ty
    x = load_streams(x_ptr + rows, c, mask, N, C, BC)
    for sublayer in tl.static_range(READS):
        packed_ptr = packed_ptrs[sublayer]
        # u = sum_i H_pre[i] x[i]
        read = load_coefficients(packed_ptr, 0, tokens, live, T, N)
        u = read[0][:, None] * x[0]
        for i in tl.static_range(1, N):
            u += read[i][:, None] * x[i]
        tl.store(u_ptrs[sublayer] + branch_rows + channels, u.to(dtype), mask=mask)
        if sublayer < WRITES:
            post = load_coefficients(packed_ptr, N, tokens, live, T, N)
            res = load_coefficients(packed_ptr, 2 * N, tokens, live, T, N * N)
            branch = load_branch(
                branch_ptrs[sublayer] + branch_rows,
                branch_bias_ptrs[sublayer],
                c,
                mask,
                (BIASES >> sublayer) & 1,
                C,
                BC,
            )
            y_rows = y_ptrs[sublayer] + rows
            wide = ()
            for o in tl.static_range(N):
                # x'[o] = sum_i H_res[o, i] x[i] + H_post[o] f, rounded to the streams' dtype
                y = post_mix_stream(x, branch, post, res, o, N).to(dtype)
                tl.store(y_rows + o * C + channels, y, mask=mask)
                wide = wide + (y.to(tl.float32),)
            x = wide
