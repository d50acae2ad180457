"""A chain of single-pass hyper-connections against its equation, written out in float64."""

import pytest
import torch
from torch import Tensor

from mhc_megatron.config import MHCConfig
from mhc_megatron.hyper_connection import HyperConnection
from mhc_megatron.streams import Contraction, join_hidden, split_hidden

N, C, SUBLAYERS = 3, 8, 4


def branch(x: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(x @ weight)


def written_out(
    streams: Tensor, connections: list[HyperConnection], weights: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """``X' = B_l X + C_l F(A_{l-1} X)``; A, B and C of one state, A_{-1} one-hot. Also A_L X."""
    mhc = connections[0].mhc
    x = streams.unflatten(-1, (N, C))
    a = torch.zeros(*x.shape[:-1], dtype=x.dtype)
    a[..., 0] = 1.0
    for connection, weight in zip(connections, weights, strict=True):
        vec = x.flatten(-2)
        raw = vec / (vec.square().mean(-1, keepdim=True) + mhc.rms_eps).sqrt()
        raw = torch.einsum("sbk,mk->sbm", raw, connection.mapping_proj.weight)
        pre, post, res = raw.split((N, N, N * N), dim=-1)
        b_pre, b_post, b_res = connection.bias.split((N, N, N * N))
        next_a = torch.sigmoid(connection.alpha_pre * pre + b_pre)
        c = 2 * torch.sigmoid(connection.alpha_post * post + b_post)
        b = torch.exp(connection.alpha_res * res + b_res).unflatten(-1, (N, N))
        for _ in range(mhc.sinkhorn_iterations):
            b = b / b.sum(-2, keepdim=True)
            b = b / b.sum(-1, keepdim=True)
        output = branch(torch.einsum("sbn,sbnc->sbc", a, x), weight)
        x = torch.einsum("sboi,sbic->sboc", b, x) + c[..., None] * output[..., None, :]
        a = next_a
    return x.flatten(-2), torch.einsum("sbn,sbnc->sbc", a, x)


def chained(
    streams: Tensor, connections: list[HyperConnection], weights: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """What the layers do, a stage boundary after every second sublayer included."""
    branch_input = streams[..., :C]
    for index, (connection, weight) in enumerate(zip(connections, weights, strict=True)):
        if index % 2 == 0:
            _, mix = connection.pre(streams)
        output = branch(branch_input, weight)
        if index % 2 == 0:
            following = connections[index + 1]
            streams, branch_input, mix = connection.post_pre(streams, output, mix, following)
        else:
            streams = connection.post(streams, output, mix)
            message = join_hidden(streams, connection.read(streams, mix))
            streams, branch_input = split_hidden(message, connection.mhc)
    return streams, branch_input


def test_output_and_every_gradient_are_those_of_the_equation() -> None:
    torch.manual_seed(0)
    mhc = MHCConfig(variant="single_pass", num_streams=N)
    connections = [
        HyperConnection(mhc, hidden_size=C, sublayer=index).double() for index in range(SUBLAYERS)
    ]
    parameters = [p for connection in connections for p in connection.parameters()]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * 0.5)
    weights = [torch.randn(C, C, dtype=torch.float64, requires_grad=True) for _ in connections]
    # Of equal streams no gradient would reach the first H_res, whose rows sum to 1.
    streams = torch.randn(4, 2, N * C, dtype=torch.float64, requires_grad=True)
    ours, theirs = (f(streams, connections, weights) for f in (chained, written_out))
    inputs = [streams, *weights, *parameters]
    seeds = [torch.randn_like(value) for value in ours]
    gradients = [torch.autograd.grad(values, inputs, seeds) for values in (ours, theirs)]
    # Float64 rounding; the two sum in another order.
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients[0])


def test_the_kernels_chain_equals_the_reference() -> None:
    """Across stage boundaries, where ``pre`` gives mappings alone and ``read`` the input."""
    results = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        mhc = MHCConfig(
            variant="single_pass",
            num_streams=N,
            sinkhorn_iterations=3,
            backend=backend,  # type: ignore[arg-type]
        )
        connections = [
            HyperConnection(mhc, hidden_size=C, sublayer=index) for index in range(SUBLAYERS)
        ]
        parameters = [p for connection in connections for p in connection.parameters()]
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn_like(parameter) * 0.5)
        weights = [torch.randn(C, C) for _ in connections]
        streams = torch.randn(4, 2, N * C, requires_grad=True)
        values = chained(streams, connections, weights)
        seeds = [torch.randn_like(value) for value in values]
        results.append((*values, *torch.autograd.grad(values, [streams, *parameters], seeds)))
    # Float32 sums in another order (6e-8 each), grown over four sublayers.
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_each_branch_starts_at_its_home_stream() -> None:
    """Its reader is the branch after the hyper-connection."""
    for sublayer in range(2 * N):
        mhc = MHCConfig(variant="single_pass", num_streams=N)
        connection = HyperConnection(mhc, hidden_size=C, sublayer=sublayer)
        _, mix = connection.pre(torch.randn(2, 1, N * C))
        assert mix.pre.argmax(-1).unique().tolist() == [(sublayer + 1) % N]


@pytest.mark.parametrize("contraction", ["mean", "sum", "learned", "read"])
def test_contraction_takes_the_streams_or_the_last_read(contraction: str) -> None:
    mhc = MHCConfig(variant="single_pass", contraction=contraction)  # type: ignore[arg-type]
    streams, last_read = torch.randn(2, 1, 4 * C), torch.randn(2, 1, C)
    contracted = Contraction(mhc, hidden_size=C)(join_hidden(streams, last_read))
    if contraction == "read":
        assert torch.equal(contracted, last_read)
    else:
        two_pass = MHCConfig(contraction=contraction)  # type: ignore[arg-type]
        assert torch.equal(contracted, Contraction(two_pass, hidden_size=C)(streams))
