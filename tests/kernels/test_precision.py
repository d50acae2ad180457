"""Which dtype is computed in: the coefficients' is float32 or wider, the streams keep theirs."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from mhc_megatron import kernels

NARROW = [torch.bfloat16, torch.float16]
DTYPES = [*NARROW, torch.float32, torch.float64]
TOKENS, N, CHANNELS = 6, 4, 9

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
narrow_dtypes = pytest.mark.parametrize("dtype", NARROW, ids=["bfloat16", "float16"])
projections = pytest.mark.parametrize("projection", kernels.RESIDUAL_PROJECTIONS)


def num_logits(projection: str) -> int:
    return 2 * N + {"permutation": math.factorial(N), "identity": 0}.get(projection, N * N)


def mappings_of(streams: Tensor, weight: Tensor, projection: str) -> kernels.Mappings:
    gates = [torch.tensor([value]) for value in (0.3, 0.4, 0.5)]
    if projection == "identity":
        gates[2] = None  # type: ignore[call-overload]
    return kernels.mappings(
        kernels.project(streams, weight, eps=1e-6),
        *gates,
        torch.linspace(-1, 1, len(weight)),
        num_streams=N,
        projection=projection,
        iterations=20,
        eps=1e-6,
    )


@dtypes
@projections
def test_coefficients_are_float32_or_float64(dtype: torch.dtype, projection: str) -> None:
    streams = torch.randn(TOKENS, N, CHANNELS).to(dtype)
    weight = torch.randn(num_logits(projection), N * CHANNELS)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    got = mappings_of(streams, weight, projection)
    assert {part.dtype for part in got} == {wide}
    # Narrow streams are read exactly: nothing is rounded on the way to the coefficients.
    again = mappings_of(streams.to(wide), weight, projection)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_narrow_operands_do_not_narrow_the_arithmetic() -> None:
    streams = torch.randn(TOKENS, N, CHANNELS, dtype=torch.bfloat16)
    weight = torch.randn(24, N * CHANNELS, dtype=torch.bfloat16)
    assert torch.equal(
        kernels.project(streams, weight, eps=1e-6),
        kernels.project(streams.float(), weight.float(), eps=1e-6),
    )
    raw = torch.randn(TOKENS, 24, dtype=torch.bfloat16)
    parameters = (torch.ones(1), torch.ones(1), torch.ones(1), torch.zeros(24))
    options = {"num_streams": N, "projection": "unconstrained", "iterations": 20, "eps": 1e-6}
    narrow, wide = (kernels.mappings(raw, *parameters, **options) for raw in (raw, raw.float()))
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


@dtypes
def test_outputs_keep_the_streams_dtype(dtype: torch.dtype) -> None:
    streams = torch.randn(TOKENS, N, CHANNELS).to(dtype)
    branch = torch.randn(TOKENS, CHANNELS).to(dtype)
    pre, post, res = torch.rand(TOKENS, N), torch.rand(TOKENS, N), torch.rand(TOKENS, N, N)
    head = (torch.randn(N, N * CHANNELS), torch.ones(1), torch.zeros(N))
    outputs = [
        kernels.pre_mix(streams, pre),
        kernels.post_mix(streams, branch, post, res),
        kernels.expand(branch, num_streams=N),
        kernels.contract_mean(streams),
        kernels.contract_sum(streams),
        kernels.contract_learned(streams, *head, rms_eps=1e-6, eps=1e-6),
    ]
    assert {output.dtype for output in outputs} == {dtype}


@narrow_dtypes
def test_sums_round_once_at_the_end(dtype: torch.dtype) -> None:
    streams = torch.randn(TOKENS, N, CHANNELS).to(dtype)
    branch = torch.randn(TOKENS, CHANNELS).to(dtype)
    pre, post, res = torch.rand(TOKENS, N), torch.rand(TOKENS, N), torch.rand(TOKENS, N, N)
    x, f = streams.float(), branch.float()
    pairs = [
        (kernels.pre_mix(streams, pre), kernels.pre_mix(x, pre)),
        (kernels.post_mix(streams, branch, post, res), kernels.post_mix(x, f, post, res)),
        (kernels.contract_mean(streams), kernels.contract_mean(x)),
        (kernels.contract_sum(streams), kernels.contract_sum(x)),
    ]
    assert all(torch.equal(got, exact.to(dtype)) for got, exact in pairs)


@narrow_dtypes
def test_parameters_get_float32_gradients_and_streams_their_own(dtype: torch.dtype) -> None:
    streams = torch.randn(TOKENS, N, CHANNELS).to(dtype).requires_grad_()
    weight = torch.randn(num_logits("sinkhorn"), N * CHANNELS, requires_grad=True)
    pre, post, res = mappings_of(streams, weight, "sinkhorn")
    out = kernels.post_mix(streams, kernels.pre_mix(streams, pre), post, res)
    out.float().square().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert streams.grad is not None and streams.grad.dtype == dtype


@projections
def test_autocast_changes_nothing(projection: str) -> None:
    streams = torch.randn(TOKENS, N, CHANNELS)
    weight = torch.randn(num_logits(projection), N * CHANNELS)
    results = []
    for context in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            pre, post, res = mappings_of(streams, weight, projection)
            read = kernels.pre_mix(streams, pre)
            results.append((pre, post, res, read, kernels.post_mix(streams, read, post, res)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@dtypes
def test_no_tokens(dtype: torch.dtype) -> None:
    """An empty batch passes through every projection, and the gradients are zeros."""
    streams = torch.empty(0, N, CHANNELS, dtype=dtype, requires_grad=True)
    for projection in kernels.RESIDUAL_PROJECTIONS:
        weight = torch.randn(num_logits(projection), N * CHANNELS, requires_grad=True)
        pre, post, res = mappings_of(streams, weight, projection)
        out = kernels.post_mix(streams, kernels.pre_mix(streams, pre), post, res)
        assert out.shape == streams.shape and res.shape == (0, N, N)
        (gradient,) = torch.autograd.grad(out.sum(), weight)
        assert torch.equal(gradient, torch.zeros_like(weight))
