"""The branch's RMSNorm inside ``pre`` and ``post_pre``: definition, kernels and every gradient."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers.fused import (
    NORM_EPS,
    Case,
    arguments,
    compare,
    operands,
    random_gradients,
    relative_error,
    rounded_states,
    run_kernels,
    run_reference,
    tolerance,
    with_gradients,
)
from torch import Tensor

from mhc_megatron.kernels import PackedMappings, functional, rms_norm

OPERATIONS = ("pre", "post_pre")


def test_rms_norm_is_torchs() -> None:
    hidden, weight = torch.randn(5, 24).double(), torch.randn(24).double()
    expected = torch.nn.functional.rms_norm(hidden, (24,), weight, eps=NORM_EPS)
    assert torch.allclose(rms_norm(hidden, weight, eps=NORM_EPS), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rms_norm_rounds_once(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(5, 24).to(dtype), torch.randn(24).to(dtype)
    wide = rms_norm(hidden.float(), weight.float(), eps=NORM_EPS)
    assert torch.equal(rms_norm(hidden, weight, eps=NORM_EPS), wide.to(dtype))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_reference_is_the_norm_of_what_is_read_without_one(operation: str) -> None:
    case = Case(operation=operation, dtype=torch.bfloat16, norm=True)
    leaves = operands(case, torch.device("cpu"))
    normed, plain = run_reference(case, leaves), run_reference(replace(case, norm=False), leaves)
    u = rms_norm(plain.pop("u"), leaves["norm_weight"], eps=NORM_EPS)
    assert torch.equal(normed.pop("u"), u)
    assert all(torch.equal(normed[name], value) for name, value in plain.items())


@pytest.mark.parametrize(
    "case",
    [
        *(Case(n=n, channels=24) for n in (1, 2, 3, 4, 8)),
        *(Case(operation="pre", n=n, channels=24, dtype=torch.bfloat16) for n in (2, 3, 8)),
        Case(dtype=torch.float16, tokens=9),
        Case(dtype=torch.bfloat16, channels=72, tokens=33, branch_bias=True),
        Case(operation="pre", tokens=1, channels=8),
        Case(tokens=0, channels=8),
        Case(operation="pre", tokens=0, channels=8),
        Case(channels=8).with_projection("unconstrained"),
        Case(channels=8).with_projection("identity"),
    ],
    ids=str,
)
def test_kernels_equal_the_reference(case: Case, device: torch.device) -> None:
    case = replace(case, norm=True)
    compare(case, operands(case, device))


@pytest.mark.parametrize(
    ("streams", "weight"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_the_weight_has_a_dtype_of_its_own_and_may_be_zero(
    streams: torch.dtype, weight: torch.dtype, device: torch.device
) -> None:
    case = Case(operation="pre", norm=True, dtype=streams, channels=16)
    leaves = operands(case, device)
    leaves["norm_weight"] = leaves["norm_weight"].to(weight)
    leaves["norm_weight"][:3] = 0
    gradients = random_gradients(run_reference(case, leaves))
    got = with_gradients(lambda x: run_kernels(case, x), leaves, gradients)
    rounded = rounded_states(case, leaves)
    expected = with_gradients(
        lambda x: run_reference(case, x, rounded=rounded), leaves, gradients, torch.float64
    )
    assert got["u"].dtype == streams
    assert got["d_norm_weight"].dtype == weight
    assert not got["u"][:, :3].any()
    assert expected["d_norm_weight"][:3].all()
    # In the dtype of the weight's gradient, one rounding.
    for name, value in expected.items():
        of = replace(case, dtype=weight) if name == "d_norm_weight" else case
        allowed = tolerance(name, of if streams == torch.float32 else case)
        assert relative_error(got[name], value) <= allowed, name


def test_without_the_mean_of_the_gradient_the_comparison_fails(device: torch.device) -> None:
    """Mutation: the gradient of u that takes the RMS for a constant is far from the kernels'."""
    case = Case(operation="pre", norm=True, channels=16)
    leaves = operands(case, device)
    gradients = random_gradients(run_reference(case, leaves))
    got = with_gradients(lambda x: run_kernels(case, x), leaves, gradients)

    def constant_rms(x: dict[str, Tensor]) -> dict[str, Tensor]:
        found = run_reference(replace(case, norm=False), x)
        u = found["u"]
        inverse_rms = (u.detach().square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
        return {**found, "u": u * inverse_rms * x["norm_weight"]}

    spoiled = with_gradients(constant_rms, leaves, gradients, torch.float64)
    assert relative_error(got["u"], spoiled["u"]) <= tolerance("u", case)
    for name in ("d_streams", "d_weight", "d_alpha_pre"):
        assert relative_error(got[name], spoiled[name]) > 100 * tolerance(name, case), name


@pytest.mark.parametrize("used", ["u", "post"])
def test_an_output_alone_has_gradients(used: str, device: torch.device) -> None:
    case = Case(norm=True, channels=8)
    leaves = operands(case, device)
    gradients = random_gradients(run_reference(case, leaves))
    gradients = {used: gradients[used]}
    got = with_gradients(lambda x: run_kernels(case, x), leaves, gradients)
    expected = with_gradients(lambda x: run_reference(case, x), leaves, gradients, torch.float64)
    for name in expected:
        assert relative_error(got[name], expected[name]) <= tolerance(name, case), name
    assert bool(got["d_norm_weight"].any()) == (used == "u")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_number_is_written_and_the_same_every_time(
    operation: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(operation=operation, norm=True, tokens=17, channels=24, dtype=torch.bfloat16)
    leaves = operands(case, device)
    gradients = random_gradients(run_reference(case, leaves))
    first = with_gradients(lambda x: run_kernels(case, x), leaves, gradients)

    def poisoned(allocate: object) -> object:
        return lambda *args, **kwargs: allocate(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    again = with_gradients(lambda x: run_kernels(case, x), leaves, gradients)
    for name, value in first.items():
        assert value.isfinite().all(), name
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_float32_per_token_more_is_kept(operation: str, device: torch.device) -> None:
    """Neither u nor its normalised form: of a run without the norm, and 1/RMS and the weight."""

    def kept(case: Case) -> list[tuple]:
        torch.manual_seed(0)
        leaves = operands(case, device)
        leaves = {
            name: leaf if leaf is None else leaf.requires_grad_() for name, leaf in leaves.items()
        }
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            run_kernels(case, leaves)
        return sorted((str(t.dtype), tuple(t.shape)) for t in saved)

    case = Case(operation=operation, dtype=torch.bfloat16, tokens=7, channels=24)
    more = [("torch.float32", (7,)), ("torch.bfloat16", (24,))]
    assert kept(replace(case, norm=True)) == sorted(kept(case) + more)


def test_the_mappings_carry_what_a_rebuild_normalises_with(device: torch.device) -> None:
    case = Case(operation="pre", channels=16)
    leaves = operands(replace(case, norm=True), device)
    gates = (leaves["alpha_pre"], leaves["alpha_post"], leaves["alpha_res"])
    positional = (leaves["streams"], leaves["weight"], gates, leaves["bias"])
    keywords = {"options": case.options, "backend": "triton"}
    u, plain = functional.pre(*positional, **keywords)
    _, mix = functional.pre(*positional, norm_weight=leaves["norm_weight"], **keywords)
    assert isinstance(plain, PackedMappings)
    assert plain.inverse_rms is None
    # Without norm_eps, Megatron's default.
    expected = (u.double().square().mean(-1) + 1e-5).rsqrt()
    assert relative_error(mix.inverse_rms, expected) <= 1e-6


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_weight": None}, "norm_eps: expected None without norm_weight, got 0.01"),
        (
            {"norm_weight": torch.ones(41)},
            "norm_weight: expected shape (40,), got (41,)",
        ),
        (
            {"norm_weight": torch.ones(40, dtype=torch.int64)},
            "norm_weight: expected a floating dtype, got torch.int64",
        ),
        ({"norm_weight": torch.ones(40, device="meta")}, "norm_weight: expected it on"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0 must be at least 0"),
        ({"norm_eps": float("nan")}, "norm_eps=nan must be at least 0"),
    ],
    ids=["eps_alone", "shape", "dtype", "device", "negative", "nan"],
)
def test_a_wrong_norm_is_refused(
    operation: str, backend: str, change: dict, message: str, device: torch.device
) -> None:
    case = Case(operation=operation, norm=True)
    positional, keywords = arguments(case, operands(case, device))
    change = {
        name: value.to(device) if isinstance(value, Tensor) and not value.is_meta else value
        for name, value in change.items()
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(functional, operation)(*positional, **{**keywords, **change}, backend=backend)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda ones: ones[:40].double(), "norm_weight: expected one of torch.float32, torch.bf"),
        (lambda ones: ones[::2], "norm_weight: expected contiguous memory, got strides (2,)"),
    ],
    ids=["dtype", "strides"],
)
def test_a_weight_that_the_kernels_cannot_read_is_refused(
    weight: Callable[[Tensor], Tensor], message: str, device: torch.device
) -> None:
    case = Case(operation="pre", norm=True)
    leaves = {**operands(case, device), "norm_weight": weight(torch.ones(80, device=device))}
    with pytest.raises(ValueError, match=re.escape(message)):
        run_kernels(case, leaves)
