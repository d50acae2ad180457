"""Reading from and writing to the streams, and the ways in and out of them."""

import numpy as np
import pytest
import torch

from mhc_megatron import kernels

shapes = pytest.mark.parametrize(
    ("tokens", "n", "channels"),
    [(tokens, n, c) for n in [1, 2, 3, 4, 8] for tokens, c in [((0,), 4), ((1,), 5), ((2, 3), 7)]],
)


@shapes
def test_pre_mix(tokens: tuple[int, ...], n: int, channels: int) -> None:
    streams = torch.randn(*tokens, n, channels, dtype=torch.float64)
    pre = torch.randn(*tokens, n, dtype=torch.float64)
    want = np.zeros((*tokens, channels))
    for i in range(n):
        want += pre.numpy()[..., i, None] * streams.numpy()[..., i, :]
    np.testing.assert_allclose(kernels.pre_mix(streams, pre).numpy(), want, rtol=0, atol=1e-14)


@shapes
def test_post_mix_reads_h_res_by_rows(tokens: tuple[int, ...], n: int, channels: int) -> None:
    """x'[o] = sum_i H_res[o, i] x[i] + H_post[o] f, entry by entry."""
    streams = torch.randn(*tokens, n, channels, dtype=torch.float64)
    branch = torch.randn(*tokens, channels, dtype=torch.float64)
    post = torch.randn(*tokens, n, dtype=torch.float64)
    res = torch.randn(*tokens, n, n, dtype=torch.float64)
    x, f, b, h = (tensor.numpy() for tensor in (streams, branch, post, res))
    want = np.zeros((*tokens, n, channels))
    for o in range(n):
        want[..., o, :] = b[..., o, None] * f
        for i in range(n):
            want[..., o, :] += h[..., o, i, None] * x[..., i, :]
    got = kernels.post_mix(streams, branch, post, res).numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)
    transposed = kernels.post_mix(streams, branch, post, res.mT).numpy()
    assert n == 1 or not got.size or np.abs(transposed - want).max() > 1e-6


def test_one_entry_of_h_res_moves_one_stream() -> None:
    streams = torch.arange(6.0).view(3, 2)
    res = torch.zeros(3, 3)
    res[0, 2] = 1.0  # output stream 0 reads input stream 2
    moved = kernels.post_mix(streams, torch.zeros(2), torch.zeros(3), res)
    assert torch.equal(moved, torch.tensor([[4.0, 5.0], [0.0, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("projection", ["sinkhorn", "permutation", "identity"])
def test_one_stream_adds_the_branch_to_the_residual(projection: str) -> None:
    streams, branch = torch.randn(5, 1, 7), torch.randn(5, 7)
    logits = torch.randn(5, 0 if projection == "identity" else 1)
    res = kernels.residual_mapping(
        logits, num_streams=1, projection=projection, iterations=20, eps=0.0
    )
    plain = kernels.post_mix(streams, branch, torch.ones(5, 1), res)
    assert torch.equal(plain.squeeze(-2), streams.squeeze(-2) + branch)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8], ids="n{}".format)
def test_expand_and_contract(n: int) -> None:
    hidden = torch.randn(2, 3, 5)
    streams = kernels.expand(hidden, num_streams=n)
    assert streams.shape == (2, 3, n, 5) and streams.is_contiguous()
    assert all(torch.equal(stream, hidden) for stream in streams.unbind(-2))
    # n - 1 roundings of float32.
    torch.testing.assert_close(kernels.contract_mean(streams), hidden, rtol=1e-6, atol=0)
    torch.testing.assert_close(kernels.contract_sum(streams), n * hidden, rtol=1e-6, atol=0)


def test_expand_owns_its_memory() -> None:
    hidden = torch.zeros(2, 3)
    for n in (1, 4):
        kernels.expand(hidden, num_streams=n).fill_(1.0)
        assert torch.equal(hidden, torch.zeros(2, 3))


def test_mean_and_sum_weigh_streams_equally() -> None:
    streams = torch.randn(2, 3, 5, dtype=torch.float64)
    total = streams.numpy()[:, 0] + streams.numpy()[:, 1] + streams.numpy()[:, 2]
    np.testing.assert_allclose(kernels.contract_sum(streams).numpy(), total, atol=1e-15)
    np.testing.assert_allclose(kernels.contract_mean(streams).numpy(), total / 3, atol=1e-15)


def test_learned_contraction_starts_uniform() -> None:
    """Zero weight and equal biases: half the sum of the streams, the final norm does the rest."""
    streams = torch.randn(2, 4, 5, dtype=torch.float64)
    got = kernels.contract_learned(
        streams,
        torch.zeros(4, 20).double(),
        torch.full((1,), 0.01).double(),
        torch.zeros(4).double(),
        rms_eps=1e-6,
        eps=0.0,
    )
    torch.testing.assert_close(got, 0.5 * kernels.contract_sum(streams), rtol=1e-14, atol=1e-15)
