"""Residual mappings: from logits to the matrix H_res that mixes the n residual streams.

``H_res[o, i]`` is the weight of input stream i in output stream o, as in the mHC paper's Eq. 3.
Suffixes: T any leading token dimensions, n streams, R logits per token, P permutations.
"""

from itertools import permutations

import torch
from torch import Tensor
from torch.nn import functional

from mhc_megatron.kernels.precision import matmul, wide_dtype

RESIDUAL_PROJECTIONS = ("sinkhorn", "sinkhorn_v4", "permutation", "identity", "unconstrained")


def residual_mapping(
    logits_TR: Tensor, *, num_streams: int, projection: str, iterations: int, eps: float
) -> Tensor:
    """Bring the gated logits of one residual mapping onto the manifold of ``projection``.

    Args:
        logits_TR: ``alpha_res * raw + bias``, [..., R]. R is n^2 (row-major ``H_res[o, i]``) for
            ``sinkhorn``, ``sinkhorn_v4`` and ``unconstrained``, n! for ``permutation``, 0 for
            ``identity``.
        num_streams: n.
        projection: one of ``RESIDUAL_PROJECTIONS``.
        iterations: of ``sinkhorn`` and ``sinkhorn_v4``; the others have none.
        eps: of ``sinkhorn_v4``; the others have none.

    Returns:
        H_res, [..., n, n], float32 (float64 for float64).

    Raises:
        ValueError: the projection does not exist.
    """
    logits_TR = logits_TR.to(wide_dtype(logits_TR))
    if projection == "permutation":
        return permutation(logits_TR, num_streams=num_streams)
    if projection == "identity":
        assert logits_TR.shape[-1] == 0, "an identity mapping has no logits"
        identity_nn = torch.eye(num_streams, dtype=logits_TR.dtype, device=logits_TR.device)
        return identity_nn.expand(*logits_TR.shape[:-1], num_streams, num_streams)
    logits_Tnn = logits_TR.unflatten(-1, (num_streams, num_streams))
    if projection == "sinkhorn":
        return sinkhorn(logits_Tnn, iterations=iterations)
    if projection == "sinkhorn_v4":
        return sinkhorn_v4(logits_Tnn, iterations=iterations, eps=eps)
    if projection == "unconstrained":
        return logits_Tnn
    raise ValueError(f"projection={projection!r} is not one of {', '.join(RESIDUAL_PROJECTIONS)}")


def sinkhorn(logits_Tnn: Tensor, *, iterations: int) -> Tensor:
    """Sinkhorn-Knopp as in the mHC paper, Eq. 9: exp, then columns and rows in turn.

    Rows come last, so their sums are 1 to rounding; what the iterations leave unfinished shows in
    the column sums. No eps anywhere.

    Args:
        logits_Tnn: [..., n, n], any finite values.
        iterations: t_max, at least 1; each normalises the columns, then the rows.

    Returns:
        [..., n, n], float32 (float64 for float64).
    """
    assert iterations >= 1
    # The first iteration works on logarithms: exp(logits) may overflow, or vanish in a whole row.
    # From then on every row and column sum is at least 1/n^2, and plain division is safe.
    log_columns_Tnn = logits_Tnn.to(wide_dtype(logits_Tnn)).log_softmax(dim=-2)
    res_Tnn = log_columns_Tnn.softmax(dim=-1)
    for _ in range(iterations - 1):
        res_Tnn = res_Tnn / res_Tnn.sum(dim=-2, keepdim=True)
        res_Tnn = res_Tnn / res_Tnn.sum(dim=-1, keepdim=True)
    return res_Tnn


def sinkhorn_v4(logits_Tnn: Tensor, *, iterations: int, eps: float) -> Tensor:
    """Sinkhorn-Knopp as in DeepSeek-V4's released code, in this package's orientation of H_res.

    V4 normalises the rows of ``comb`` first and applies ``comb`` transposed; transposed, that is
    columns of H_res first, as in ``sinkhorn``. V4 adds eps to every entry after the first
    normalisation and to every sum it divides by later. With eps = 0 it equals ``sinkhorn``.

    Args:
        logits_Tnn: [..., n, n], ``H_res[o, i]``: the transpose of V4's ``comb`` logits.
        iterations: at least 1, the first softmax included (V4: 20).
        eps: V4's ``hc_eps`` (1e-6).

    Returns:
        [..., n, n], float32 (float64 for float64).
    """
    assert iterations >= 1
    res_Tnn = logits_Tnn.to(wide_dtype(logits_Tnn)).softmax(dim=-2) + eps
    res_Tnn = res_Tnn / (res_Tnn.sum(dim=-1, keepdim=True) + eps)
    for _ in range(iterations - 1):
        res_Tnn = res_Tnn / (res_Tnn.sum(dim=-2, keepdim=True) + eps)
        res_Tnn = res_Tnn / (res_Tnn.sum(dim=-1, keepdim=True) + eps)
    return res_Tnn


def permutation(logits_TR: Tensor, *, num_streams: int) -> Tensor:
    """mHC-lite: the softmax-weighted mean of all n! permutation matrices.

    Doubly stochastic to rounding without iterating, by Birkhoff's theorem.

    Args:
        logits_TR: [..., n!], in the order of ``itertools.permutations(range(n))``: the identity
            first. Under permutation ``order``, output stream o reads input stream ``order[o]``.
        num_streams: n.

    Returns:
        [..., n, n], float32 (float64 for float64).
    """
    orders_Pn = torch.tensor(list(permutations(range(num_streams))), device=logits_TR.device)
    weights_TP = logits_TR.to(wide_dtype(logits_TR)).softmax(dim=-1)
    matrices_Pnn = functional.one_hot(orders_Pn, num_streams).to(weights_TP.dtype)
    res_TR = matmul(weights_TP, matrices_Pnn.flatten(start_dim=1))
    return res_TR.unflatten(-1, (num_streams, num_streams))
