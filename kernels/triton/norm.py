"""Device functions: the RMSNorm of a branch's input, on rows that the program has just written.

Rows are BT tokens of C channels. Between the pass that writes them and the one that reads them
again lies a barrier: other threads may read than wrote.
"""

import triton
import triton.language as tl

from mhc_megatron.kernels.triton.tile_math import channel_mask, widened


@triton.jit
def load_norm_weight(weight_ptr, columns, C: tl.constexpr):
    return tl.load(weight_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)


@triton.jit
def scaled(u, inverse_rms, weight):
    """``w u / rms(u)`` in float32, of [BT, BC] u in its own dtype."""
    return widened(u) * inverse_rms[:, None] * weight[None, :]


@triton.jit
def normalise(
    u_rows,
    weight_ptr,
    inverse_rms,
    live,
    C: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``scaled`` in the place of u. ``u_rows``: [BT, 1] pointers."""
    tl.debug_barrier()
    for c in tl.range(0, C, BC, num_stages=STAGES):
        mask = channel_mask(live, c, C, BC)
        columns = c + tl.arange(0, BC)
        pointers = u_rows + columns[None, :]
        u = tl.load(pointers, mask=mask, other=0.0)
        normed = scaled(u, inverse_rms, load_norm_weight(weight_ptr, columns, C))
        tl.store(pointers, normed.to(u.dtype), mask=mask)


@triton.jit
def store_norm_partial(partial_ptr, grad, u, inverse_rms, columns, C: tl.constexpr):
    """This program's part of w's gradient, ``sum_t grad_v u / rms(u)``, a row of C."""
    sums = tl.sum(grad * u * inverse_rms[:, None], axis=0)
    tl.store(partial_ptr + columns, sums, mask=columns < C)


@triton.jit
def normalise_bwd(
    u_rows,
    grad_rows,
    weight_ptr,
    inverse_rms,
    slope,
    live,
    C: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """u's gradient, ``(w grad_v - slope u) / rms(u)``, in the place of u.

    ``slope``: [BT], ``mean(w grad_v u) / rms(u)^2``. From the last chunk to the first: what was
    read and written last is still in L2.
    """
    tl.debug_barrier()
    CHUNKS: tl.constexpr = (C + BC - 1) // BC
    for chunk in tl.range(0, CHUNKS, num_stages=STAGES):
        c = (CHUNKS - 1 - chunk) * BC
        mask = channel_mask(live, c, C, BC)
        columns = c + tl.arange(0, BC)
        pointers = u_rows + columns[None, :]
        u = tl.load(pointers, mask=mask, other=0.0)
        grad = widened(tl.load(grad_rows + columns[None, :], mask=mask, other=0.0))
        grad *= load_norm_weight(weight_ptr, columns, C)[None, :]
        grad_u = (grad - slope[:, None] * widened(u)) * inverse_rms[:, None]
        tl.store(pointers, grad_u.to(u.dtype), mask=mask)
