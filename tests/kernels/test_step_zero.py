"""What the initialisation computes, what it hides, and why other tests randomise parameters.

A network of six branches with the initial mappings of docs/math.md, against the same branches on
a plain residual stream, in float64.
"""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mhc_megatron import kernels

NUM_SUBLAYERS, N, CHANNELS, TOKENS = 6, 4, 8, 5
EPS = 1e-6
NO_NORM_EPS = 1e-20  # the branch's own norm then removes the scale of its input entirely
SILENT = 1e-11  # above the rounding that a sum of cancelling float64 terms leaves
LOUD = 1e-8  # below any gradient that does not cancel


@dataclass(frozen=True)
class Connection:
    """The parameters of one hyper-connection, all leaves that require gradients."""

    weight: Tensor
    alphas: tuple[Tensor, Tensor, Tensor | None]
    bias: Tensor

    def split_gradient(self) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        for name, parameter in (("phi", self.weight), ("b", self.bias)):
            assert parameter.grad is not None
            pre, post, res = parameter.grad.tensor_split((N, 2 * N))
            parts |= {f"{name}_pre": pre, f"{name}_post": post, f"{name}_res": res}
        return parts

    def gate_gradients(self) -> list[float]:
        gradients = [alpha.grad for alpha in self.alphas if alpha is not None]
        return [gradient.item() for gradient in gradients if gradient is not None]


def initial_bias(projection: str, home: int) -> Tensor:
    one_hot, identity = torch.eye(N)[home], torch.eye(N)
    pre, post = 6 * one_hot - 3, torch.zeros(N)
    res = (6 * identity - 3).flatten()
    if projection == "identity":
        res = torch.empty(0)
    elif projection == "permutation":
        orders = list(itertools.permutations(range(N)))
        res = torch.tensor([0.0 if order == tuple(range(N)) else -8.0 for order in orders])
    elif projection == "unconstrained":
        pre, post, res = one_hot, torch.ones(N), identity.flatten()
    return torch.cat([pre, post, res]).double()


def connections(projection: str, *, homes: list[int], noise: float = 0.0) -> list[Connection]:
    """One hyper-connection per sublayer: the initialisation plus ``noise`` times randn."""
    made = []
    for home in homes:
        bias = initial_bias(projection, home)
        weight = torch.zeros(len(bias), N * CHANNELS, dtype=torch.float64)
        gate = torch.full((1,), 0.01, dtype=torch.float64)
        leaves = [
            (tensor + noise * torch.randn_like(tensor)).requires_grad_()
            for tensor in (weight, bias, gate, gate, gate)
        ]
        alpha_res = None if projection == "identity" else leaves[4]
        made.append(Connection(leaves[0], (leaves[2], leaves[3], alpha_res), leaves[1]))
    return made


class Branches:
    """f_l(x) = W2 tanh(W1 RMSNorm(x)), different for every sublayer."""

    def __init__(self, *, norm_eps: float) -> None:
        self.norm_eps = norm_eps
        shape = (NUM_SUBLAYERS, 2, CHANNELS, CHANNELS)
        self.weights = torch.randn(shape, dtype=torch.float64) / CHANNELS**0.5

    def __call__(self, sublayer: int, x: Tensor) -> Tensor:
        normed = x * (x.square().mean(-1, keepdim=True) + self.norm_eps).rsqrt()
        inner, outer = self.weights[sublayer]
        return (normed @ inner).tanh() @ outer

    def plain(self, hidden: Tensor) -> Tensor:
        for sublayer in range(NUM_SUBLAYERS):
            hidden = hidden + self(sublayer, hidden)
        return hidden

    def connected(self, hidden: Tensor, sites: list[Connection], projection: str) -> Tensor:
        streams = kernels.expand(hidden, num_streams=N)
        for sublayer, site in enumerate(sites):
            pre, post, res = kernels.mappings(
                kernels.project(streams, site.weight, eps=EPS),
                *site.alphas,
                site.bias,
                num_streams=N,
                projection=projection,
                iterations=20,
                eps=EPS,
            )
            branch = self(sublayer, kernels.pre_mix(streams, pre))
            streams = kernels.post_mix(streams, branch, post, res)
        return kernels.contract_mean(streams)


def rotating_homes() -> list[int]:
    return [sublayer % N for sublayer in range(NUM_SUBLAYERS)]


def gradients(projection: str, sites: list[Connection]) -> None:
    branches = Branches(norm_eps=NO_NORM_EPS)
    hidden = torch.randn(TOKENS, CHANNELS, dtype=torch.float64)
    out = branches.connected(hidden, sites, projection)
    (out * torch.randn_like(out)).sum().backward()


@pytest.mark.parametrize("projection", kernels.RESIDUAL_PROJECTIONS)
def test_output_equals_the_plain_residual_network(projection: str) -> None:
    branches = Branches(norm_eps=NO_NORM_EPS)
    hidden = torch.randn(TOKENS, CHANNELS, dtype=torch.float64)
    sites = connections(projection, homes=rotating_homes())
    error = (branches.connected(hidden, sites, projection) - branches.plain(hidden)).abs().max()
    if projection == "sinkhorn_v4":  # each row of H_res falls short of 1 by about eps
        assert 1e-8 < error < NUM_SUBLAYERS * 10 * EPS
    else:
        assert error < 1e-12


@pytest.mark.parametrize("projection", kernels.RESIDUAL_PROJECTIONS)
def test_the_eps_of_the_branch_norm_keeps_the_scale_of_h_pre(projection: str) -> None:
    """H_pre sums to 1.095, so the norm's eps weighs less than in the plain network."""
    branches = Branches(norm_eps=1e-5)
    hidden = 0.02 * torch.randn(TOKENS, CHANNELS, dtype=torch.float64)
    sites = connections(projection, homes=rotating_homes())
    got, plain = branches.connected(hidden, sites, projection), branches.plain(hidden)
    if projection == "unconstrained":  # its H_pre is one-hot and sums to 1
        torch.testing.assert_close(got, plain, rtol=0, atol=1e-12)
    else:
        assert (got - plain).abs().max() > 1e-5


def test_h_pre_sums_to_more_than_one() -> None:
    """The number in docs/math.md."""
    pre = initial_bias("sinkhorn", 0)[:N].sigmoid()
    assert round(pre.sum().item(), 3) == 1.095


@pytest.mark.parametrize("projection", ["sinkhorn", "permutation", "identity"])
def test_only_h_post_learns_in_the_first_step(projection: str) -> None:
    sites = connections(projection, homes=rotating_homes())
    gradients(projection, sites)
    for site in sites:
        parts = site.split_gradient()
        assert parts["b_post"].abs().max() > LOUD
        assert parts["phi_post"].abs().max() > LOUD
        for name in ("b_pre", "b_res", "phi_pre", "phi_res"):
            assert parts[name].numel() == 0 or parts[name].abs().max() < SILENT, name
        assert all(gradient == 0 for gradient in site.gate_gradients())  # raw = 0 while phi = 0


def test_streams_part_because_h_pre_reads_them_unevenly() -> None:
    """The gradient of b_post is what first tells streams apart."""
    rotating = connections("sinkhorn", homes=rotating_homes())
    gradients("sinkhorn", rotating)
    spread = [site.split_gradient()["b_post"] for site in rotating]
    # After the last sublayer nothing reads the streams but the mean.
    assert all(part.max() - part.min() > LOUD for part in spread[:-1])
    symmetric = connections("sinkhorn", homes=rotating_homes())
    for site in symmetric:
        site.bias.data[:N] = 0.0  # every stream read alike
    gradients("sinkhorn", symmetric)
    for site in symmetric:
        part = site.split_gradient()["b_post"]
        torch.testing.assert_close(part, part.mean().expand(N), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("projection", kernels.RESIDUAL_PROJECTIONS)
def test_random_parameters_give_inner_sublayers_every_gradient(projection: str) -> None:
    sites = connections(projection, homes=rotating_homes(), noise=0.5)
    gradients(projection, sites)
    for site in sites[1:-1]:
        for name, part in site.split_gradient().items():
            assert part.numel() == 0 or part.abs().max() > LOUD, name
        assert all(abs(gradient) > LOUD for gradient in site.gate_gradients())


@pytest.mark.parametrize("projection", kernels.RESIDUAL_PROJECTIONS)
def test_the_first_sublayer_never_learns_pre_nor_res(projection: str) -> None:
    """Its streams are copies: H_pre only scales them, and rows that sum to 1 keep them."""
    sites = connections(projection, homes=rotating_homes(), noise=0.5)
    gradients(projection, sites)
    parts = sites[0].split_gradient()
    assert parts["b_pre"].abs().max() < SILENT and parts["phi_pre"].abs().max() < SILENT
    if projection in ("sinkhorn", "permutation"):
        assert parts["b_res"].abs().max() < SILENT and parts["phi_res"].abs().max() < SILENT
    elif projection == "sinkhorn_v4":  # its row sums move by a fraction of eps
        assert SILENT < parts["b_res"].abs().max() < EPS
    elif projection == "unconstrained":  # its row sums are free
        assert parts["b_res"].abs().max() > LOUD
    assert parts["b_post"].abs().max() > LOUD


def test_the_last_sublayer_never_learns_a_doubly_stochastic_res() -> None:
    """The mean over streams is kept by columns that sum to 1."""
    sites = connections("permutation", homes=rotating_homes(), noise=0.5)
    gradients("permutation", sites)
    parts = sites[-1].split_gradient()
    assert parts["b_res"].abs().max() < SILENT and parts["phi_res"].abs().max() < SILENT
    assert parts["b_pre"].abs().max() > LOUD
