"""Streams as [..., n*C]: the bits of those as [..., n, C], without a view in the graph."""

from dataclasses import replace

import pytest
import torch
from helpers.fused import OPERATIONS, Case, arguments, operands
from torch import Tensor

from mhc_megatron.kernels import functional

N = Case().n


def results(case: Case, leaves: dict[str, Tensor | None], backend: str, *, flat: bool) -> dict:
    """Outputs and gradients by name, the streams' in [..., n, C]."""
    given = {
        name: None if leaf is None else leaf.detach().requires_grad_()
        for name, leaf in leaves.items()
    }
    streams = given["streams"]
    shaped = streams.flatten(-2).detach().requires_grad_() if flat else streams
    positional, keywords = arguments(case, {**given, "streams": shaped})
    if flat:
        keywords["num_streams"] = case.n
    outputs = getattr(functional, case.operation)(*positional, **keywords, backend=backend)
    states = [outputs] if case.operation == "post" else list(outputs[:-1])
    if case.operation != "post":
        states += [outputs[-1].pre, outputs[-1].post, outputs[-1].res]
    wanted = {**given, "streams": shaped}
    wanted = {name: leaf for name, leaf in wanted.items() if leaf is not None}
    # Not all outputs depend on all operands.
    grads = torch.autograd.grad(
        states, list(wanted.values()), [state * 0 + 0.5 for state in states], allow_unused=True
    )
    named = {f"out{index}": state.detach() for index, state in enumerate(states)}
    named |= {f"d_{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    if flat:
        assert named["d_streams"].shape == shaped.shape
        named["d_streams"] = named["d_streams"].unflatten(-1, (case.n, -1))
        if case.operation != "pre":
            assert named["out0"].shape == shaped.shape
            named["out0"] = named["out0"].unflatten(-1, (case.n, -1))
    return named


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_flat_streams_have_the_same_bits(
    operation: str, backend: str, norm: bool, device: torch.device
) -> None:
    case = Case(operation=operation, norm=norm and operation in ("pre", "post_pre"))
    leaves = operands(case, device)
    # Tokens in two dimensions, as in a model.
    expected = results(case, leaves, backend, flat=False)
    got = results(case, leaves, backend, flat=True)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        other = got[name]
        assert (value is None and other is None) or torch.equal(value, other), name


def test_flat_streams_go_from_pre_to_post_without_a_sum_of_gradients(
    device: torch.device,
) -> None:
    """``post`` of the tensor that ``pre`` read hands its gradient over, as for [..., n, C]."""
    leaves = operands(replace(Case(operation="post_pre"), dtype=torch.bfloat16), device)
    gradients = []
    for flat in (False, True):
        given = {k: None if v is None else v.detach().requires_grad_() for k, v in leaves.items()}
        streams = given["streams"]
        if flat:
            streams = streams.flatten(-2).detach().requires_grad_()
        more = {"num_streams": N} if flat else {}
        gates = (given["alpha_pre"], given["alpha_post"], given["alpha_res"])
        u, mix = functional.pre(
            streams,
            given["weight"],
            gates,
            given["bias"],
            options=Case().options,
            backend="triton",
            **more,
        )
        out = functional.post(streams, u * 2, mix, backend="triton", **more)
        (grad,) = torch.autograd.grad(out.square().sum(), [streams])
        gradients.append(grad.reshape(-1))
    assert torch.equal(*gradients)


def test_only_one_node_is_between_flat_streams(device: torch.device) -> None:
    leaves = operands(Case(), device)
    streams = leaves["streams"].flatten(-2).requires_grad_()
    positional, keywords = arguments(Case(), {**leaves, "streams": streams})
    out, *_ = functional.post_pre(*positional, **keywords, num_streams=N, backend="triton")
    assert out.grad_fn is not None
    assert out.grad_fn.name() == "FusedBackward"
    into = [type(node).__name__ for node, _ in out.grad_fn.next_functions if node is not None]
    assert "AccumulateGrad" in into


@pytest.mark.parametrize(
    ("num_streams", "message"),
    [
        (
            3,
            r"streams: expected \[\.\.\., 3\*C\] with num_streams=3, got \(5, 160\)",
        ),
        (0, "num_streams=0 must be at least 1"),
        (8, r"weight: expected shape \(80, 160\), got \(24, 160\)"),
    ],
)
def test_a_number_of_streams_that_does_not_fit_is_named(
    num_streams: int, message: str, device: torch.device
) -> None:
    case = Case(operation="pre")
    leaves = operands(case, device)
    positional, keywords = arguments(case, {**leaves, "streams": leaves["streams"].flatten(-2)})
    with pytest.raises(ValueError, match=message):
        functional.pre(*positional, **keywords, num_streams=num_streams)
