"""From streams to coefficients: the projection, the gates, the packing and both kinds of eps."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mhc_megatron import kernels

NUM_STREAMS = [1, 2, 3, 4, 8]
shapes = pytest.mark.parametrize(
    ("tokens", "n", "channels"),
    [(tokens, n, channels) for n in NUM_STREAMS for tokens, channels in [(0, 4), (1, 5), (7, 1)]],
)


def gate(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def sinkhorn_mappings(raw: Tensor, bias: Tensor, *, n: int, **changes: object) -> kernels.Mappings:
    options = {"num_streams": n, "projection": "sinkhorn", "iterations": 20, "eps": 1e-6}
    gates = (gate(0.5), gate(-0.7), gate(1.3))
    return kernels.mappings(raw, *gates, bias, **(options | changes))  # type: ignore[arg-type]


@shapes
def test_project_is_equations_14_to_16(tokens: int, n: int, channels: int) -> None:
    num_logits = 2 * n + n * n
    streams = torch.randn(tokens, n, channels, dtype=torch.float64)
    weight = torch.randn(num_logits, n * channels, dtype=torch.float64)
    want = np.zeros((tokens, num_logits))
    for t, x in enumerate(streams.numpy()):
        flat = [x[i, c] for i in range(n) for c in range(channels)]  # stream before channel
        r = math.sqrt(sum(v * v for v in flat) / (n * channels) + 1e-6)
        for m in range(num_logits):
            want[t, m] = sum(v * w for v, w in zip(flat, weight[m].tolist(), strict=True)) / r
    got = kernels.project(streams, weight, eps=1e-6).numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)


def test_stream_index_before_channel() -> None:
    # Megatron's flat [s, b, n*C] viewed as [s, b, n, C]: weight column i*C + c reads x[i, c].
    streams = torch.zeros(3, 5, dtype=torch.float64)
    streams[2, 1] = 1.0
    weight = torch.arange(15, dtype=torch.float64).unsqueeze(0)
    raw = kernels.project(streams, weight, eps=0.0)
    assert raw.item() == pytest.approx((2 * 5 + 1) * math.sqrt(15), rel=1e-15)


def test_one_statistic_per_token_over_all_streams() -> None:
    # A second stream 100 times larger shrinks what the first one contributes.
    streams = torch.ones(2, 3, dtype=torch.float64)
    streams[1] = 100.0
    weight = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    raw = kernels.project(streams, weight, eps=0.0)
    assert raw.item() == pytest.approx(3 / math.sqrt((1 + 100**2) / 2), rel=1e-15)


def test_rms_eps_is_inside_the_square_root() -> None:
    streams = torch.full((1, 4), 2.0, dtype=torch.float64)
    weight = torch.ones(1, 4, dtype=torch.float64)
    raw = kernels.project(streams, weight, eps=5.0)
    assert raw.item() == pytest.approx(8 / math.sqrt(4 + 5), rel=1e-15)


def test_zero_token_has_a_finite_gradient() -> None:
    streams = torch.zeros(2, 4, 3, requires_grad=True)
    weight = torch.randn(24, 12, requires_grad=True)
    raw = kernels.project(streams, weight, eps=1e-6)
    assert torch.equal(raw, torch.zeros(2, 24))
    gradients = torch.autograd.grad(raw.sum(), (streams, weight))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("n", NUM_STREAMS, ids="n{}".format)
def test_mappings_are_equations_16_to_19(n: int) -> None:
    raw = torch.randn(2, 3, 2 * n + n * n, dtype=torch.float64)
    bias = torch.randn(2 * n + n * n, dtype=torch.float64)
    got = sinkhorn_mappings(raw, bias, n=n)
    gates = torch.tensor([0.5] * n + [-0.7] * n + [1.3] * n * n, dtype=torch.float64)
    logits = raw * gates + bias
    sigmoid = 1 / (1 + np.exp(-logits.numpy()))
    np.testing.assert_allclose(got.pre.numpy(), sigmoid[..., :n], rtol=1e-14)
    np.testing.assert_allclose(got.post.numpy(), 2 * sigmoid[..., n : 2 * n], rtol=1e-14)
    res_logits = logits[..., 2 * n :].reshape(2, 3, n, n)
    torch.testing.assert_close(
        got.res, kernels.sinkhorn(res_logits, iterations=20), rtol=1e-14, atol=0
    )


def test_packing_is_pre_post_res() -> None:
    n = 3
    plain = sinkhorn_mappings(torch.zeros(15).double(), torch.zeros(15).double(), n=n)
    for logit in range(15):
        raw = torch.zeros(15, dtype=torch.float64)
        raw[logit] = 1.0
        changed = sinkhorn_mappings(raw, torch.zeros(15).double(), n=n)
        is_pre, is_post = logit < n, n <= logit < 2 * n
        assert torch.equal(changed.pre, plain.pre) != is_pre
        assert torch.equal(changed.post, plain.post) != is_post
        assert torch.equal(changed.res, plain.res) != (not is_pre and not is_post)
        if is_pre:
            assert (changed.pre != plain.pre).nonzero().item() == logit
        elif is_post:
            assert (changed.post != plain.post).nonzero().item() == logit - n
        else:  # a positive gate raises the logit's own entry most
            assert (changed.res - plain.res).argmax() == logit - 2 * n


def test_eps_of_v4_is_added_to_pre_and_not_to_post() -> None:
    raw, bias = torch.randn(5, 24).double(), torch.randn(24).double()
    paper = sinkhorn_mappings(raw, bias, n=4, eps=0.125)
    floored = sinkhorn_mappings(raw, bias, n=4, eps=0.125, projection="sinkhorn_v4")
    assert torch.equal(floored.pre, paper.pre + 0.125)
    assert torch.equal(floored.post, paper.post)


def test_eps_reaches_no_other_projection() -> None:
    raw, bias = torch.randn(5, 24).double(), torch.randn(24).double()
    for projection, num_logits, alpha_res in [
        ("sinkhorn", 3 + 3 + 9, gate(1.3)),
        ("permutation", 3 + 3 + 6, gate(1.3)),
        ("identity", 3 + 3, None),
        ("unconstrained", 3 + 3 + 9, gate(1.3)),
    ]:
        without, with_eps = (
            kernels.mappings(
                raw[:, :num_logits],
                gate(0.5),
                gate(-0.7),
                alpha_res,
                bias[:num_logits],
                num_streams=3,
                projection=projection,
                iterations=20,
                eps=eps,
            )
            for eps in (0.0, 0.5)
        )
        assert all(torch.equal(a, b) for a, b in zip(without, with_eps, strict=True))


def test_unconstrained_gates_the_tanh() -> None:
    n = 3
    raw, bias = 3 * torch.randn(4, 15).double(), torch.randn(15).double()
    got = sinkhorn_mappings(raw, bias, n=n, projection="unconstrained")
    want = np.tanh(raw.numpy()) * ([0.5] * n + [-0.7] * n + [1.3] * n * n) + bias.numpy()
    np.testing.assert_allclose(got.pre.numpy(), want[:, :n], rtol=1e-13)
    np.testing.assert_allclose(got.post.numpy(), want[:, n : 2 * n], rtol=1e-13)
    np.testing.assert_allclose(got.res.numpy(), want[:, 2 * n :].reshape(4, n, n), rtol=1e-13)


@pytest.mark.parametrize("n", [2, 4], ids="n{}".format)
def test_initial_values_of_the_mappings(n: int) -> None:
    """The numbers that docs/math.md quotes for the initialisation."""
    home = torch.eye(n)[0]
    bias = torch.cat([6 * home - 3, torch.zeros(n), (6 * torch.eye(n) - 3).flatten()]).double()
    pre, post, res = sinkhorn_mappings(torch.zeros_like(bias), bias, n=n)
    assert [round(value, 3) for value in pre.tolist()] == [0.953] + [0.047] * (n - 1)
    assert torch.equal(post, torch.ones(n).double())
    diagonal, other = {2: (0.99753, 0.00247), 4: (0.99262, 0.00246)}[n]
    want = other + (diagonal - other) * torch.eye(n).double()
    torch.testing.assert_close(res, want, rtol=0, atol=5e-6)  # five decimals


def test_initial_value_of_the_permutation_mapping() -> None:
    bias = torch.full((24,), -8.0, dtype=torch.float64)
    bias[0] = 0.0
    res = kernels.permutation(bias, num_streams=4)
    # Of the other 23 permutations, 5 keep a given stream in place: 3! - 1.
    weight = math.exp(-8) / (1 + 23 * math.exp(-8))
    want = 1 - 18 * weight
    np.testing.assert_allclose(res.diagonal().numpy(), want, rtol=1e-14)
    assert round(want, 3) == 0.994
