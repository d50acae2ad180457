"""Hyper-connections in plain torch: the definition that every faster implementation must equal.

All functions are differentiable by autograd. Coefficients are computed in float32 (float64 if an
operand is float64) whatever the streams' dtype, and weighted sums of streams are rounded to the
streams' dtype once, at the end. Float32 products follow torch's float32 matmul precision, whose
default is full float32.

Suffixes: T any leading token dimensions, n streams, C channels, K = n*C, M = 2n + R mapping logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mhc_megatron.kernels.precision import matmul, wide_dtype
from mhc_megatron.kernels.projections import residual_mapping


class Mappings(NamedTuple):
    """The coefficients of one hyper-connection, per token; float32 (float64 for float64).

    Attributes:
        pre: H_pre, [..., n], the weights with which the branch reads the streams.
        post: H_post, [..., n], the weights with which the branch's output is written to them.
        res: H_res, [..., n, n], ``res[..., o, i]`` the weight of stream i in the new stream o.
    """

    pre: Tensor
    post: Tensor
    res: Tensor


def project(streams: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Raw mapping logits of each token (mHC paper, Eq. 14 and 15, and the division in Eq. 16).

    All n*C numbers of a token share one RMS, and the matrix product is divided by it, not its
    input; the RMSNorm has no weight of its own (it is absorbed in phi).

    Args:
        streams: [..., n, C], any floating dtype.
        weight: phi transposed, [M, n*C], the stream index before the channel.
        eps: added to the mean square, inside the square root.

    Returns:
        ``vec(x) phi / rms(vec(x))``, [..., M], float32 (float64 if an operand is float64).
    """
    dtype = wide_dtype(streams, weight)
    vec_TK = streams.flatten(-2).to(dtype)
    inverse_rms_T1 = (vec_TK.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return matmul(vec_TK, weight.to(dtype).t()) * inverse_rms_T1


def mappings(
    raw: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor | None,
    bias: Tensor,
    *,
    num_streams: int,
    projection: str,
    iterations: int,
    eps: float,
) -> Mappings:
    """Gate the raw logits, add the bias, and bring the three mappings onto their manifolds.

    mHC paper, Eq. 16 to 19: ``sigmoid`` for H_pre, ``2 sigmoid`` for H_post, ``residual_mapping``
    for H_res. DeepSeek-V4 (``sinkhorn_v4``) adds eps to H_pre. Hyper-connections
    (``unconstrained``; paper, Eq. 5) pass the raw logits through tanh before the gates, and what
    comes out are the mappings.

    Args:
        raw: [..., M] from ``project``, packed pre (n) | post (n) | res (R).
        alpha_pre: gate of the first n logits, [1].
        alpha_post: gate of the next n logits, [1].
        alpha_res: gate of the last R logits, [1]; None if and only if ``identity`` (R = 0).
        bias: [M], packed as ``raw``.
        num_streams: n.
        projection: see ``residual_mapping``.
        iterations: see ``residual_mapping``.
        eps: of ``sinkhorn_v4``; the others have none.

    Returns:
        ([..., n], [..., n], [..., n, n]), float32 (float64 for float64).

    Raises:
        ValueError: the projection does not exist.
    """
    assert raw.shape[-1] == bias.shape[-1], (raw.shape, bias.shape)
    assert (alpha_res is None) == (projection == "identity"), "one gate per mapping"
    unconstrained = projection == "unconstrained"
    raw = raw.to(wide_dtype(raw, bias))
    parts = (num_streams, 2 * num_streams)
    pre, post, res = (raw.tanh() if unconstrained else raw).tensor_split(parts, dim=-1)
    bias_pre, bias_post, bias_res = bias.tensor_split(parts)
    pre = alpha_pre * pre + bias_pre
    post = alpha_post * post + bias_post
    if alpha_res is not None:
        res = alpha_res * res + bias_res
    res = residual_mapping(
        res, num_streams=num_streams, projection=projection, iterations=iterations, eps=eps
    )
    if unconstrained:
        return Mappings(pre, post, res)
    pre = pre.sigmoid()
    if projection == "sinkhorn_v4":
        pre = pre + eps
    return Mappings(pre, 2 * post.sigmoid(), res)


def pre_mix(streams: Tensor, pre: Tensor) -> Tensor:
    """The branch's input, ``sum_i H_pre[i] x[i]`` (mHC paper, Eq. 3).

    Args:
        streams: [..., n, C], any floating dtype.
        pre: [..., n], float32 (float64).

    Returns:
        [..., C] in the streams' dtype; the sum is taken in float32 (float64 for float64).
    """
    dtype = wide_dtype(streams, pre)
    mixed_T1C = matmul(pre.to(dtype).unsqueeze(-2), streams.to(dtype))
    return mixed_T1C.squeeze(-2).to(streams.dtype)


def post_mix(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """The next streams, ``x'[o] = sum_i H_res[o, i] x[i] + H_post[o] f`` (mHC paper, Eq. 3).

    Args:
        streams: x, [..., n, C], any floating dtype.
        branch: f, the branch's output, [..., C], any floating dtype.
        post: [..., n], float32 (float64).
        res: [..., n, n], float32 (float64).

    Returns:
        [..., n, C] in the streams' dtype; the sum is taken in float32 (float64 for float64).
    """
    dtype = wide_dtype(streams, branch, post, res)
    carried_TnC = matmul(res.to(dtype), streams.to(dtype))
    written_TnC = post.to(dtype).unsqueeze(-1) * branch.to(dtype).unsqueeze(-2)
    return (carried_TnC + written_TnC).to(streams.dtype)


def rms_norm(hidden: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """``w u / sqrt(mean(u^2) + eps)``, the RMSNorm of a branch (Zhang, Sennrich 2019).

    Args:
        hidden: u, [..., C], any floating dtype.
        weight: w, [C], any floating dtype; one plus a zero-centred one.
        eps: added to the mean square, inside the square root.

    Returns:
        [..., C] in ``hidden``'s dtype; computed in float32 (float64 if an operand is float64).
    """
    dtype = wide_dtype(hidden, weight)
    wide = hidden.to(dtype)
    inverse_rms_T1 = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return (wide * inverse_rms_T1 * weight.to(dtype)).to(hidden.dtype)


def expand(hidden: Tensor, *, num_streams: int) -> Tensor:
    """Copy one residual stream into n.

    Args:
        hidden: [..., C].
        num_streams: n.

    Returns:
        [..., n, C], the same dtype, in memory of its own.
    """
    repeated = hidden.unsqueeze(-2).expand(*hidden.shape[:-1], num_streams, hidden.shape[-1])
    return repeated.clone(memory_format=torch.contiguous_format)


def contract_mean(streams: Tensor) -> Tensor:
    """The mean of the streams, the inverse of ``expand``.

    Args:
        streams: [..., n, C].

    Returns:
        [..., C] in the streams' dtype; the mean is taken in float32 (float64 for float64).
    """
    return streams.mean(dim=-2, dtype=wide_dtype(streams)).to(streams.dtype)


def contract_sum(streams: Tensor) -> Tensor:
    """The sum of the streams, as in hyper-connections; a norm must follow to remove the factor n.

    Args:
        streams: [..., n, C].

    Returns:
        [..., C] in the streams' dtype; the sum is taken in float32 (float64 for float64).
    """
    return streams.sum(dim=-2, dtype=wide_dtype(streams)).to(streams.dtype)


def contract_learned(
    streams: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, *, rms_eps: float, eps: float
) -> Tensor:
    """DeepSeek-V4's ``hc_head``: a sum of the streams weighted by a sigmoid of the token.

    Args:
        streams: [..., n, C], any floating dtype.
        weight: [n, n*C], V4's ``hc_head_fn``.
        scale: [1], V4's ``hc_head_scale``.
        bias: [n], V4's ``hc_head_base``.
        rms_eps: added to the mean square of the n*C vector, inside the square root.
        eps: added to the weights, V4's ``hc_eps``.

    Returns:
        [..., C] in the streams' dtype; the sum is taken in float32 (float64 for float64).
    """
    raw = project(streams, weight, eps=rms_eps)
    return pre_mix(streams, (raw * scale + bias).sigmoid() + eps)
