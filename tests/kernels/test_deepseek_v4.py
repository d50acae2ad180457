"""DeepSeek-V4's block and head, written from its formulas, against this package's functions.

The formulas keep V4's own orientation: ``comb`` starts with a softmax of its rows and mixes the
streams transposed. Converting a V4 checkpoint means transposing the res logits' two indices.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from mhc_megatron import kernels

HC_EPS = 1e-6
NORM_EPS = 1e-5
ITERATIONS = 20


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def v4_sublayer(
    h: np.ndarray, fn: np.ndarray, base: np.ndarray, scale: np.ndarray, branch: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One token: the branch's input [d], and the next streams [n, d]."""
    n = len(h)
    x = h.reshape(-1)
    m = (fn @ x) / np.sqrt((x * x).mean() + NORM_EPS)
    pre = sigmoid(m[:n] * scale[0] + base[:n]) + HC_EPS
    post = 2 * sigmoid(m[n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = np.exp((m[2 * n :] * scale[2] + base[2 * n :]).reshape(n, n))
    comb = comb / comb.sum(axis=1, keepdims=True) + HC_EPS
    comb = comb / (comb.sum(axis=0, keepdims=True) + HC_EPS)
    for _ in range(ITERATIONS - 1):
        comb = comb / (comb.sum(axis=1, keepdims=True) + HC_EPS)
        comb = comb / (comb.sum(axis=0, keepdims=True) + HC_EPS)
    read = sum(pre[j] * h[j] for j in range(n))
    written = [post[k] * branch + sum(comb[j, k] * h[j] for j in range(n)) for k in range(n)]
    return read, np.stack(written)


def v4_head(h: np.ndarray, fn: np.ndarray, base: np.ndarray, scale: float) -> np.ndarray:
    x = h.reshape(-1)
    pre = sigmoid((fn @ x) / np.sqrt((x * x).mean() + NORM_EPS) * scale + base) + HC_EPS
    return sum(pre[j] * h[j] for j in range(len(h)))


def transpose_res(packed: Tensor, n: int) -> Tensor:
    """Swap the two indices of the res part along the first dimension, [2n + n^2, ...]."""
    res = packed[2 * n :].unflatten(0, (n, n)).transpose(0, 1).flatten(0, 1)
    return torch.cat([packed[: 2 * n], res])


@pytest.mark.parametrize("n", [2, 4], ids="n{}".format)
@pytest.mark.parametrize("spread", [1.0, 5.0], ids=["mild", "spread"])
def test_sublayer_equals_deepseek_v4(n: int, spread: float) -> None:
    tokens, channels = 20, 7
    h = torch.randn(tokens, n, channels, dtype=torch.float64)
    branch = torch.randn(tokens, channels, dtype=torch.float64)
    fn = torch.randn(2 * n + n * n, n * channels, dtype=torch.float64) / (n * channels) ** 0.5
    base = torch.randn(2 * n + n * n, dtype=torch.float64)
    scale = spread * torch.tensor([1.0, -1.5, 2.0], dtype=torch.float64)

    raw = kernels.project(h, transpose_res(fn, n), eps=NORM_EPS)
    pre, post, res = kernels.mappings(
        raw,
        *scale.split(1),
        transpose_res(base, n),
        num_streams=n,
        projection="sinkhorn_v4",
        iterations=ITERATIONS,
        eps=HC_EPS,
    )
    read = kernels.pre_mix(h, pre).numpy()
    written = kernels.post_mix(h, branch, post, res).numpy()
    for t in range(tokens):
        want_read, want_written = v4_sublayer(
            h[t].numpy(), fn.numpy(), base.numpy(), scale.numpy(), branch[t].numpy()
        )
        # Summation order in the dot products, carried through 40 normalisations.
        np.testing.assert_allclose(read[t], want_read, rtol=0, atol=1e-12)
        np.testing.assert_allclose(written[t], want_written, rtol=0, atol=1e-12)


def test_head_equals_deepseek_v4() -> None:
    tokens, n, channels = 20, 4, 7
    h = torch.randn(tokens, n, channels, dtype=torch.float64)
    fn = torch.randn(n, n * channels, dtype=torch.float64)
    base = torch.randn(n, dtype=torch.float64)
    scale = torch.tensor([0.7], dtype=torch.float64)
    got = kernels.contract_learned(h, fn, scale, base, rms_eps=NORM_EPS, eps=HC_EPS).numpy()
    for t in range(tokens):
        want = v4_head(h[t].numpy(), fn.numpy(), base.numpy(), scale.item())
        np.testing.assert_allclose(got[t], want, rtol=0, atol=1e-12)
