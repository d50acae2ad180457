"""Autograd through every function, against finite differences in float64.

All parameters are random: under the initialisation most of these gradients are zero.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from mhc_megatron import kernels

TOKENS, CHANNELS = 2, 3
PROJECTIONS = list(kernels.RESIDUAL_PROJECTIONS)
OPTIONS = {"iterations": 5, "eps": 1e-3}  # an eps large enough to matter

num_streams_cases = pytest.mark.parametrize("n", [1, 2, 3], ids="n{}".format)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def num_res_logits(projection: str, n: int) -> int:
    return {"permutation": math.factorial(n), "identity": 0}.get(projection, n * n)


@num_streams_cases
def test_project(n: int) -> None:
    streams, weight = randn(TOKENS, n, CHANNELS), randn(5, n * CHANNELS)
    assert gradcheck(lambda x, w: kernels.project(x, w, eps=0.1), (streams, weight))


@num_streams_cases
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_residual_mapping(projection: str, n: int) -> None:
    logits = randn(TOKENS, num_res_logits(projection, n))

    def run(logits: Tensor) -> Tensor:
        return kernels.residual_mapping(logits, num_streams=n, projection=projection, **OPTIONS)

    if projection == "identity":
        assert not run(logits).requires_grad
    else:
        assert gradcheck(run, (logits,))


@num_streams_cases
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_mappings(projection: str, n: int) -> None:
    num_res = num_res_logits(projection, n)
    alpha_res = randn(1) if num_res else None
    raw, bias = randn(TOKENS, 2 * n + num_res), randn(2 * n + num_res)

    def run(*operands: Tensor | None) -> tuple[Tensor, ...]:
        mapped = kernels.mappings(*operands, num_streams=n, projection=projection, **OPTIONS)
        return mapped if alpha_res is not None else mapped[:2]  # the identity has no gradient

    assert gradcheck(run, (raw, randn(1), randn(1), alpha_res, bias))


@num_streams_cases
def test_pre_mix(n: int) -> None:
    assert gradcheck(kernels.pre_mix, (randn(TOKENS, n, CHANNELS), randn(TOKENS, n)))


@num_streams_cases
def test_post_mix(n: int) -> None:
    operands = (
        randn(TOKENS, n, CHANNELS),
        randn(TOKENS, CHANNELS),
        randn(TOKENS, n),
        randn(TOKENS, n, n),
    )
    assert gradcheck(kernels.post_mix, operands)


def test_rms_norm() -> None:
    operands = (randn(TOKENS, CHANNELS), randn(CHANNELS))
    assert gradcheck(lambda u, w: kernels.rms_norm(u, w, eps=0.1), operands)


@num_streams_cases
def test_expand(n: int) -> None:
    hidden = randn(TOKENS, CHANNELS)
    assert gradcheck(lambda hidden: kernels.expand(hidden, num_streams=n), (hidden,))


@num_streams_cases
@pytest.mark.parametrize("contract", [kernels.contract_mean, kernels.contract_sum])
def test_contract_mean_and_sum(contract: Callable[[Tensor], Tensor], n: int) -> None:
    assert gradcheck(contract, (randn(TOKENS, n, CHANNELS),))


@num_streams_cases
def test_contract_learned(n: int) -> None:
    operands = (randn(TOKENS, n, CHANNELS), randn(n, n * CHANNELS), randn(1), randn(n))
    assert gradcheck(
        lambda *operands: kernels.contract_learned(*operands, rms_eps=0.1, eps=0.1), operands
    )


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_whole_hyper_connection(projection: str) -> None:
    """The streams' gradient is the sum of three uses: the coefficients, the read, the carry."""
    n = 3
    num_res = num_res_logits(projection, n)
    operands = (
        randn(TOKENS, n, CHANNELS),
        randn(2 * n + num_res, n * CHANNELS),
        randn(1),
        randn(1),
        randn(1) if num_res else None,
        randn(2 * n + num_res),
    )

    def run(streams: Tensor, weight: Tensor, *gates_and_bias: Tensor | None) -> Tensor:
        raw = kernels.project(streams, weight, eps=0.1)
        mapped = kernels.mappings(
            raw, *gates_and_bias, num_streams=n, projection=projection, **OPTIONS
        )
        branch = kernels.pre_mix(streams, mapped.pre).tanh()
        return kernels.post_mix(streams, branch, mapped.post, mapped.res)

    assert gradcheck(run, operands)
