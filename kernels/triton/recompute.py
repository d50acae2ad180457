"""The states inside a block of sublayers, walked through with the residual on chip."""

import triton
import triton.language as tl

from mhc_megatron.kernels.triton.norm import load_norm_weight, scaled
from mhc_megatron.kernels.triton.tile_math import (
    channel_mask,
    load_branch,
    load_coefficients,
    load_streams,
    post_mix_stream,
    pre_mix,
    token_rows,
    widened,
)


@triton.jit
def rebuild_fwd(
    x_ptr,
    branch_ptrs,
    branch_bias_ptrs,
    packed_ptrs,
    y_ptrs,
    u_ptrs,
    norm_weight_ptrs,
    inverse_rms_ptrs,
    T,
    C: tl.constexpr,
    N: tl.constexpr,
    READS: tl.constexpr,
    WRITES: tl.constexpr,
    BIASES: tl.constexpr,
    NORMS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """Of BT tokens and BC channels, u of READS sublayers, and the streams after WRITES of them.

    ``packed_ptrs`` and ``u_ptrs`` have READS entries; ``branch_ptrs``, ``branch_bias_ptrs`` and
    ``y_ptrs`` WRITES, which is as many or one less. BIASES has a bit for each branch with a bias;
    of the others the entry is None. NORMS is the same for ``norm_weight_ptrs`` and
    ``inverse_rms_ptrs``, of READS entries: u is then normalised as ``mix_fwd`` did. Given the
    coefficients no channel needs another, so the state never leaves the registers; it is rounded
    to the streams' dtype between sublayers, as ``mix_fwd`` stores and reads it.
    """
    T = tl.cast(T, tl.int64)
    first, tokens, live = token_rows(T, BT)
    c = tl.program_id(1) * BC
    mask = channel_mask(live, c, C, BC)
    rows = first * (N * C) + tl.arange(0, BT)[:, None] * (N * C)
    branch_rows = first * C + tl.arange(0, BT)[:, None] * C
    channels = (c + tl.arange(0, BC))[None, :]
    dtype = x_ptr.dtype.element_ty
    x = load_streams(x_ptr + rows, c, mask, N, C, BC, "")
    for sublayer in tl.static_range(READS):
        packed_ptr = packed_ptrs[sublayer]
        # u = sum_i H_pre[i] x[i]
        read = load_coefficients(packed_ptr, 0, tokens, live, T, N)
        u = pre_mix(x, read, N).to(dtype)
        if (NORMS >> sublayer) & 1:
            inverse_rms = tl.load(inverse_rms_ptrs[sublayer] + tokens, mask=live, other=0.0)
            columns = c + tl.arange(0, BC)
            weight = load_norm_weight(norm_weight_ptrs[sublayer], columns, C)
            u = scaled(u, inverse_rms, weight).to(dtype)
        tl.store(u_ptrs[sublayer] + branch_rows + channels, u, mask=mask)
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
                wide = wide + (widened(y),)
            x = wide
