"""The Triton kernels against the compositions in float64: every output and every gradient.

On a GPU the same tests run compiled, at larger sizes as well.
"""

from dataclasses import replace

import pytest
import torch
from helpers.fused import (
    OPERATIONS,
    Case,
    compare,
    operands,
    random_gradients,
    relative_error,
    run_kernels,
    run_reference,
    tolerance,
    with_gradients,
)
from torch import Tensor

from mhc_megatron.kernels import RESIDUAL_PROJECTIONS

ON_GPU = torch.cuda.is_available()
gpu_only = pytest.mark.skipif(not ON_GPU, reason="too large for the interpreter")


def check(case: Case, device: torch.device, **keywords: object) -> None:
    compare(case, operands(case, device), **keywords)


# Without 8! logits, which are refused: see test_backend_cannot_run.
@pytest.mark.parametrize(
    ("projection", "n"),
    [
        (projection, n)
        for projection in RESIDUAL_PROJECTIONS
        for n in (1, 2, 3, 4, 8)
        if (projection, n) != ("permutation", 8)
    ],
)
def test_every_projection_and_number_of_streams(
    projection: str, n: int, device: torch.device
) -> None:
    check(Case(n=n, channels=24).with_projection(projection), device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_and_dtype(
    operation: str, dtype: torch.dtype, device: torch.device
) -> None:
    check(Case(operation=operation, dtype=dtype, tokens=9), device)


@pytest.mark.parametrize("n", [1, 2, 3, 8], ids="n{}".format)
def test_bfloat16_of_other_numbers_of_streams(n: int, device: torch.device) -> None:
    check(Case(n=n, dtype=torch.bfloat16, channels=24), device)


@pytest.mark.parametrize("tokens", [0, 1, 33], ids="T{}".format)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_any_number_of_tokens(operation: str, tokens: int, device: torch.device) -> None:
    check(Case(operation=operation, tokens=tokens, channels=8), device)


@pytest.mark.parametrize("channels", [8, 64, 72, 136], ids="C{}".format)
@pytest.mark.parametrize(
    ("operation", "n"),
    [("post_pre", 1), ("post_pre", 2), ("post_pre", 4), ("pre", 4), ("single_pass", 4)],
)
def test_channels_with_and_without_a_tail(
    operation: str, n: int, channels: int, device: torch.device
) -> None:
    check(Case(operation=operation, n=n, channels=channels, dtype=torch.bfloat16), device)


@pytest.mark.parametrize("operation", ["post", "post_pre"])
def test_branch_bias(operation: str, device: torch.device) -> None:
    check(Case(operation=operation, branch_bias=True), device)


@pytest.mark.parametrize("projection", ["sinkhorn", "sinkhorn_v4"])
def test_one_and_twenty_iterations(projection: str, device: torch.device) -> None:
    for iterations in (1, 20):
        case = Case(channels=8).with_projection(projection)
        check(replace(case, options=replace(case.options, iterations=iterations)), device)


@pytest.mark.parametrize("used", ["streams", "u", "res"])
def test_an_output_alone_has_gradients(used: str, device: torch.device) -> None:
    """The other outputs' gradients are then None."""
    case = Case(channels=8)
    leaves = operands(case, device)
    gradients = random_gradients(run_reference(case, leaves))
    gradients = {used: gradients[used]}
    got = with_gradients(lambda x: run_kernels(case, x), leaves, gradients)
    expected = with_gradients(lambda x: run_reference(case, x), leaves, gradients, torch.float64)
    for name in expected:
        assert relative_error(got[name], expected[name]) <= tolerance(name, case), name


def test_a_chain_of_sublayers(device: torch.device) -> None:
    """Mappings pass from one kernel to the next packed, with their gradients."""
    case = Case(channels=16)
    leaves = operands(case, device)
    post_case, pre_case = replace(case, operation="post"), replace(case, operation="pre")

    def chain(run: object) -> object:
        def apply(x: dict[str, Tensor | None]) -> dict[str, Tensor]:
            first = run(pre_case, x)
            mix = {f"mix_{name}": first[name] for name in ("pre", "post", "res")}
            second = run(case, {**x, **mix, "branch": first["u"].tanh()})
            mix = {f"mix_{name}": second[name] for name in ("pre", "post", "res")}
            last = {**x, **mix, "streams": second["streams"], "branch": second["u"].tanh()}
            return run(post_case, last)

        return apply

    gradients = random_gradients({"streams": leaves["streams"]})
    got = with_gradients(chain(run_kernels), leaves, gradients)
    expected = with_gradients(chain(run_reference), leaves, gradients, torch.float64)
    for name in ("streams", "d_streams", "d_weight", "d_bias"):
        assert relative_error(got[name], expected[name]) <= 2e-5, name


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_number_of_the_outputs_is_written(
    operation: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(allocate: object) -> object:
        return lambda *args, **kwargs: allocate(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    check(Case(operation=operation, tokens=17, dtype=torch.bfloat16), device)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_same_bits_every_time(operation: str, device: torch.device) -> None:
    case = Case(operation=operation, tokens=17, dtype=torch.bfloat16)
    if ON_GPU:
        case = replace(case, tokens=3001, channels=1288)
    leaves = operands(case, device)
    gradients = random_gradients(run_reference(case, leaves))
    first = with_gradients(lambda x: run_kernels(case, x), leaves, gradients)
    for _ in range(20 if ON_GPU else 1):
        again = with_gradients(lambda x: run_kernels(case, x), leaves, gradients)
        for name in first:
            assert torch.equal(first[name], again[name]), name


def test_large_logits_stay_finite(device: torch.device) -> None:
    case = Case(channels=8)
    leaves = operands(case, device)
    leaves["bias"] = leaves["bias"] * 300
    got = with_gradients(
        lambda x: run_kernels(case, x), leaves, random_gradients(run_reference(case, leaves))
    )
    assert all(value.isfinite().all() for value in got.values())


def test_no_wide_copy_of_the_streams_is_kept(device: torch.device) -> None:
    """For backward: the streams before and after, the branch, and float32 numbers per token.

    And phi in two parts, of as many bytes as phi, which forward made.
    """
    case = Case(dtype=torch.bfloat16, channels=64)
    leaves = operands(case, device)
    leaves = {
        name: leaf if leaf is None else leaf.requires_grad_() for name, leaf in leaves.items()
    }
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run_kernels(case, leaves)
    parameters = {leaf.data_ptr() for leaf in leaves.values() if leaf is not None}
    per_token = case.n * (case.n + 2) + case.options.num_logits(case.n) + 1
    wide = [t for t in saved if t.dtype == torch.float32 and t.data_ptr() not in parameters]
    largest = {t.data_ptr(): t.numel() for t in wide if t.numel() >= case.tokens * case.n}
    # The packed form of the test's mappings, the new mappings, and the raw logits.
    packing = case.n * (case.n + 2)
    assert sum(largest.values()) <= case.tokens * (per_token + packing) + leaves["mix_res"].numel()
    narrow = [tuple(t.shape) for t in saved if t.dtype == torch.bfloat16]
    states = [(case.tokens, case.n, case.channels)] * 2 + [(case.tokens, case.channels)]
    phi = (2, case.options.num_logits(case.n), case.n * case.channels)
    assert sorted(narrow) == sorted([*states, phi])


SIZES = [(4096, 4, 2560), (1000, 4, 1288), (63, 3, 7168), (515, 2, 2560), (300, 8, 2560)]


# Of float32 only sizes at which the reference in float64 takes no minutes.
@gpu_only
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("dtype", "tokens", "n", "channels"),
    [
        (dtype, *size)
        for dtype in (torch.bfloat16, torch.float32)
        for size in SIZES
        if dtype == torch.bfloat16 or size[0] <= 1000
    ],
)
def test_model_sizes(
    dtype: torch.dtype, tokens: int, n: int, channels: int, seed: int, device: torch.device
) -> None:
    torch.manual_seed(seed)
    check(Case(tokens=tokens, n=n, channels=channels, dtype=dtype), device)


@gpu_only
def test_more_than_2_to_the_31_elements(device: torch.device) -> None:
    """The last tokens of a large state equal the same tokens alone."""
    tokens = 2**31 // (4 * 2560) + 64
    case = Case(operation="post", tokens=tokens, channels=2560, dtype=torch.bfloat16)
    small = replace(case, tokens=64)
    tail = operands(small, device)
    state = torch.zeros(tokens, 4, 2560, dtype=torch.bfloat16, device=device)
    branch = torch.zeros(tokens, 2560, dtype=torch.bfloat16, device=device)
    leaves = {"streams": state, "branch": branch, "branch_bias": None}
    for name in ("mix_pre", "mix_post", "mix_res"):
        leaves[name] = torch.zeros(tokens, *tail[name].shape[1:], device=device)
    for name, leaf in leaves.items():
        if leaf is not None:
            leaf[-64:] = tail[name]
    large = run_kernels(case, leaves)["streams"][-64:]
    assert torch.equal(large, run_kernels(small, tail)["streams"])
