"""phi's gradient added to a buffer in the backward, as Megatron's gradient accumulation fusion."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers.fused import Case, arguments, flatten, operands
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mhc_megatron.kernels import functional
from mhc_megatron.kernels.triton.tiles import default_tiles

READERS = ("pre", "post_pre", "single_pass")


def backward(
    case: Case, leaves: dict[str, Tensor | None], repeat: int = 1, **keywords: object
) -> dict[str, Tensor | None]:
    """The gradients of all leaves after ``repeat`` forwards and backwards."""
    leaves = {
        name: leaf if leaf is None else leaf.detach().clone().requires_grad_(leaf.requires_grad)
        for name, leaf in leaves.items()
    }
    positional, options = arguments(case, leaves)
    for _ in range(repeat):
        outputs = getattr(functional, case.operation)(*positional, **options, **keywords)
        sum(
            (out.float() ** 2).sum() for out in flatten(case.operation, outputs).values()
        ).backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf is not None}


def trained(case: Case, device: torch.device) -> dict[str, Tensor | None]:
    return {
        name: leaf if leaf is None else leaf.requires_grad_()
        for name, leaf in operands(case, device).items()
    }


CASES = [
    *(Case(operation=operation) for operation in READERS),
    Case(operation="post_pre", dtype=torch.bfloat16, tokens=70),
    Case(operation="post_pre").with_projection("identity"),
    Case(operation="pre", tokens=0),
]


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_sum_is_that_of_gradient_and_buffer_to_the_bit(
    case: Case, backend: str, device: torch.device
) -> None:
    leaves = trained(case, device)
    keywords: dict[str, object] = {"backend": backend}
    if case.tokens > 64:  # several partial sums of phi's gradient
        tiles = default_tiles(case.n, case.tokens, case.channels, case.dtype)
        keywords["tiles"] = replace(tiles, weight_split=tiles.weight_backward.tokens)
    plain = backward(case, leaves, **keywords)
    before = torch.randn_like(leaves["weight"])
    main_grad = before.clone()
    fused = backward(case, leaves, main_grad=main_grad, **keywords)
    assert fused.pop("weight") is None
    gradient = plain.pop("weight")
    assert torch.equal(main_grad, before + gradient)
    assert case.tokens == 0 or gradient.norm() > 0
    for name, expected in plain.items():
        assert (expected is None) == (fused[name] is None), name
        assert expected is None or torch.equal(fused[name], expected), name


def test_micro_batches_add_up(device: torch.device) -> None:
    case = Case()
    leaves = trained(case, device)
    gradient = backward(case, leaves, backend="triton")["weight"]
    main_grad = torch.zeros_like(gradient)
    backward(case, leaves, repeat=3, main_grad=main_grad, backend="triton")
    assert torch.equal(main_grad, gradient + gradient + gradient)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_frozen_phi_adds_nothing(backend: str, device: torch.device) -> None:
    leaves = trained(Case(), device)
    leaves["weight"].requires_grad_(False)
    main_grad = torch.ones_like(leaves["weight"])
    backward(Case(), leaves, main_grad=main_grad, backend=backend)
    assert torch.equal(main_grad, torch.ones_like(main_grad))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("operation", READERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:-1], "main_grad: expected shape (24, 160), got (23, 160)"),
        (
            lambda t: t.bfloat16(),
            "main_grad: expected contiguous torch.float32, got torch.bfloat16",
        ),
        (
            lambda t: t.t().contiguous().t(),
            "main_grad: expected contiguous torch.float32, got torch.float32 with strides (1, 24)",
        ),
        (lambda t: t.to("meta"), "main_grad: expected it on"),
    ],
    ids=["shape", "dtype", "strides", "device"],
)
def test_a_wrong_buffer_is_refused(
    operation: str,
    backend: str,
    change: Callable[[Tensor], Tensor],
    message: str,
    device: torch.device,
) -> None:
    case = Case(operation=operation)
    leaves = operands(case, device)
    with pytest.raises(ValueError, match=re.escape(message)):
        backward(case, leaves, main_grad=change(leaves["weight"].clone()), backend=backend)


def test_a_buffer_is_refused_while_tracing(device: torch.device) -> None:
    case = Case(operation="pre")
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(leaf) for name, leaf in operands(case, device).items()}
        positional, options = arguments(case, fakes)
        with pytest.raises(ValueError, match="main_grad: expected None while tracing"):
            functional.pre(
                *positional,
                **options,
                main_grad=torch.zeros_like(fakes["weight"]),
                backend="triton",
            )
