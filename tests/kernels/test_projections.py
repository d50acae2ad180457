"""The residual mappings against formulas written out in numpy, and their defining properties."""

import itertools
import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mhc_megatron import kernels
from mhc_megatron.config import Projection

ITERATIONS = 20
EPS = 1e-6
NUM_STREAMS = [1, 2, 3, 4, 8]
MANIFOLDS = ["sinkhorn", "sinkhorn_v4", "permutation", "identity"]

num_streams_cases = pytest.mark.parametrize("n", NUM_STREAMS, ids="n{}".format)


def num_logits(projection: str, n: int) -> int:
    return {"permutation": math.factorial(n), "identity": 0}.get(projection, n * n)


def mapping(logits: Tensor, projection: str, n: int, *, eps: float = EPS) -> Tensor:
    return kernels.residual_mapping(
        logits, num_streams=n, projection=projection, iterations=ITERATIONS, eps=eps
    )


def random_mapping(projection: str, n: int, *, tokens: int = 16, scale: float = 1.0) -> Tensor:
    logits = scale * torch.randn(tokens, num_logits(projection, n), dtype=torch.float64)
    return mapping(logits, projection, n)


def equation_9(logits: np.ndarray, iterations: int) -> np.ndarray:
    """The paper's iteration on one matrix, entry by entry."""
    n = len(logits)
    m = [[math.exp(logits[o, i]) for i in range(n)] for o in range(n)]
    for _ in range(iterations):
        columns = [sum(m[o][i] for o in range(n)) for i in range(n)]
        m = [[m[o][i] / columns[i] for i in range(n)] for o in range(n)]
        rows = [sum(m[o]) for o in range(n)]
        m = [[m[o][i] / rows[o] for i in range(n)] for o in range(n)]
    return np.array(m)


def log_equation_9(logits: np.ndarray, iterations: int) -> np.ndarray:
    """The same on logarithms from beginning to end, where no logit is too large."""
    m = logits.astype(np.float64)
    for _ in range(iterations):
        m = m - np.logaddexp.reduce(m, axis=-2, keepdims=True)
        m = m - np.logaddexp.reduce(m, axis=-1, keepdims=True)
    return np.exp(m)


@num_streams_cases
@pytest.mark.parametrize("iterations", [1, 2, 20], ids="t{}".format)
def test_sinkhorn_is_equation_9(n: int, iterations: int) -> None:
    logits = 2 * torch.randn(5, n, n, dtype=torch.float64)
    want = np.stack([equation_9(matrix, iterations) for matrix in logits.numpy()])
    got = kernels.sinkhorn(logits, iterations=iterations).numpy()
    # Relative rounding of 2*20 normalisations.
    np.testing.assert_allclose(got, want, rtol=1e-13, atol=0)


@pytest.mark.parametrize("projection", ["sinkhorn", "sinkhorn_v4"])
def test_columns_first_rows_last(projection: str) -> None:
    # Logits so spread that 20 iterations do not converge; the order shows in what is left over.
    res = random_mapping(projection, 4, tokens=200, scale=6.0)
    rows, columns = res.sum(-1), res.sum(-2)
    row_error = 2 * EPS if projection == "sinkhorn_v4" else 1e-14
    assert (rows - 1).abs().max() < row_error
    assert (columns - 1).abs().max() > 0.01


def test_sinkhorn_v4_equals_sinkhorn_without_eps() -> None:
    logits = 3 * torch.randn(64, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(
        kernels.sinkhorn_v4(logits, iterations=ITERATIONS, eps=0.0),
        kernels.sinkhorn(logits, iterations=ITERATIONS),
        rtol=1e-13,  # the two round the first iteration differently
        atol=0,
    )


def test_sinkhorn_v4_eps_floors_entries_and_sums() -> None:
    # One iteration of a diagonal far above the rest: each place of eps shows by itself.
    logits = 100 * torch.eye(2, dtype=torch.float64)
    res = kernels.sinkhorn_v4(logits, iterations=1, eps=0.25)
    row_sum = (1 + 0.25) + (0 + 0.25)
    want = torch.tensor([[1.25, 0.25], [0.25, 1.25]], dtype=torch.float64) / (row_sum + 0.25)
    torch.testing.assert_close(res, want, rtol=1e-15, atol=0)
    again = kernels.sinkhorn_v4(logits, iterations=2, eps=0.25)
    want = want / (want.sum(-2, keepdim=True) + 0.25)
    want = want / (want.sum(-1, keepdim=True) + 0.25)
    torch.testing.assert_close(again, want, rtol=1e-15, atol=0)


def test_sinkhorn_v4_rows_fall_short_of_one_by_eps() -> None:
    rows = random_mapping("sinkhorn_v4", 4).sum(-1)
    # s / (s + eps) with a row sum s between 1/2 and 2 before the last division.
    assert (rows < 1 - EPS / 2).all() and (rows > 1 - 2 * EPS).all()


@pytest.mark.parametrize(
    ("scale", "at_least", "at_most"), [(1.0, 0.0, 1e-4), (6.0, 0.1, 1.0)], ids=["mild", "spread"]
)
def test_sinkhorn_v4_leaves_sinkhorn_for_spread_logits(
    scale: float, at_least: float, at_most: float
) -> None:
    logits = scale * torch.randn(5000, 4, 4, dtype=torch.float64)
    exact = kernels.sinkhorn(logits, iterations=ITERATIONS)
    floored = kernels.sinkhorn_v4(logits, iterations=ITERATIONS, eps=EPS)
    assert at_least < (exact - floored).abs().max() < at_most


@pytest.mark.parametrize("n", [1, 2, 3, 4], ids="n{}".format)
def test_permutation_weights_every_permutation_matrix(n: int) -> None:
    logits = torch.randn(math.factorial(n), dtype=torch.float64)
    weights = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum()
    want = np.zeros((n, n))
    for weight, order in zip(weights, itertools.permutations(range(n)), strict=True):
        for o in range(n):
            want[o, order[o]] += weight
    got = kernels.permutation(logits, num_streams=n).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-14)


def test_permutation_order_is_that_of_itertools() -> None:
    for index, order in enumerate(itertools.permutations(range(3))):
        logits = torch.full((6,), -1000.0)
        logits[index] = 0.0
        res = kernels.permutation(logits, num_streams=3)
        assert torch.equal(res, torch.eye(3)[list(order)])  # row o is the unit vector of order[o]


def test_identity_and_unconstrained() -> None:
    identity = mapping(torch.empty(2, 3, 0), "identity", 4)
    assert torch.equal(identity, torch.eye(4).expand(2, 3, 4, 4))
    logits = torch.randn(2, 9)
    assert torch.equal(mapping(logits, "unconstrained", 3), logits.view(2, 3, 3))


def test_residual_logits_are_row_major() -> None:
    logits = torch.randn(9, dtype=torch.float64)
    for projection, function in [
        ("sinkhorn", lambda m: kernels.sinkhorn(m, iterations=ITERATIONS)),
        ("sinkhorn_v4", lambda m: kernels.sinkhorn_v4(m, iterations=ITERATIONS, eps=EPS)),
    ]:
        matrix = torch.stack([logits[0:3], logits[3:6], logits[6:9]])  # row o = output stream o
        assert torch.equal(mapping(logits, projection, 3), function(matrix))


def test_every_projection_of_the_configuration_exists() -> None:
    assert get_args(Projection) == kernels.RESIDUAL_PROJECTIONS
    for projection in get_args(Projection):
        assert random_mapping(projection, 2).shape == (16, 2, 2)
    with pytest.raises(ValueError, match=r"projection='newton' is not one of sinkhorn, .*"):
        mapping(torch.randn(4), "newton", 2)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 8),
    scale=st.floats(0, 2),
    projection=st.sampled_from(["sinkhorn", "permutation", "identity"]),
)
def test_doubly_stochastic(seed: int, n: int, scale: float, projection: str) -> None:
    if projection == "permutation":
        n = min(n, 4)
    random = torch.Generator().manual_seed(seed)
    shape = (3, num_logits(projection, n))
    # Bounded logits: 200 iterations then converge, and columns can be asked for as well as rows.
    logits = scale * (2 * torch.rand(shape, generator=random, dtype=torch.float64) - 1)
    res = kernels.residual_mapping(
        logits, num_streams=n, projection=projection, iterations=200, eps=0.0
    )
    ones = torch.ones(3, n, dtype=torch.float64)
    assert (res >= 0).all()
    torch.testing.assert_close(res.sum(-1), ones, rtol=0, atol=1e-14)
    torch.testing.assert_close(res.sum(-2), ones, rtol=0, atol=1e-12)
    # The three claims of the paper that follow: never expanding, closed under products, and
    # the spectral norm exactly 1 (the vector of ones is kept).
    product = res[0] @ res[1] @ res[2]
    for matrix in (*res, product):
        assert abs(torch.linalg.matrix_norm(matrix, ord=2).item() - 1) < 1e-12
    torch.testing.assert_close(product.sum(-1), ones[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(product.sum(-2), ones[0], rtol=0, atol=1e-12)


def test_truncated_sinkhorn_expands_only_by_its_column_sums() -> None:
    res = random_mapping("sinkhorn", 4, tokens=500, scale=6.0)
    largest_column = res.sum(-2).amax(-1)
    norm = torch.linalg.matrix_norm(res, ord=2)
    assert (norm <= largest_column.sqrt() + 1e-13).all()  # |A|_2^2 <= |A|_1 |A|_inf, rows sum to 1
    assert norm.max() > 1 + 1e-3
    composite = res[0]
    for matrix in res[1:]:
        composite = matrix @ composite
    # The forward gain of 500 layers is still 1: rows stay exact under products.
    torch.testing.assert_close(composite.sum(-1), torch.ones(4).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("projection", ["sinkhorn", "permutation", "identity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_one_stream_is_the_plain_residual(projection: str, dtype: torch.dtype) -> None:
    logits = 30 * torch.randn(100, num_logits(projection, 1), dtype=dtype)
    assert torch.equal(mapping(logits, projection, 1), torch.ones(100, 1, 1, dtype=dtype))


@num_streams_cases
def test_large_logits_stay_finite_and_right(n: int) -> None:
    # exp(+-80) overflows or vanishes in float32, and whole rows vanish beside the largest column.
    logits = 80 * torch.sign(torch.randn(500, n, n))
    logits[0, 0] = -80
    logits[0, 1:] = 80
    logits.requires_grad_()
    res = kernels.sinkhorn(logits, iterations=ITERATIONS)
    want = log_equation_9(logits.detach().numpy(), ITERATIONS)
    # Twenty iterations of float32 rounding.
    np.testing.assert_allclose(res.detach().numpy(), want, rtol=0, atol=2e-6)
    (res * torch.randn_like(res)).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("projection", MANIFOLDS)
def test_huge_logits_stay_finite(projection: str) -> None:
    logits = 1e4 * torch.randn(100, num_logits(projection, 4))
    logits.requires_grad_()
    res = mapping(logits, projection, 4)
    assert res.isfinite().all()
    if projection != "identity":
        (res * torch.randn_like(res)).sum().backward()
        assert logits.grad is not None and logits.grad.isfinite().all()
