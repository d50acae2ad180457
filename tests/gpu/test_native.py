"""The extension on a GPU: Python's bits, eagerly and as a CUDA graph."""

import pytest
import torch
from helpers.fused import Case
from helpers.repeated import Repeated, python_only, same
from torch import Tensor

from mhc_megatron.kernels import native

CASES = [
    Case(operation=operation, tokens=304, channels=1280, dtype=dtype, norm=norm, n=n)
    for operation, norm, n, dtype in (
        ("post_pre", False, 4, torch.bfloat16),
        ("post_pre", True, 4, torch.bfloat16),
        ("post_pre", False, 2, torch.float32),
        ("single_pass", False, 4, torch.bfloat16),
        ("pre", True, 4, torch.bfloat16),
        ("post", False, 4, torch.float16),
    )
]


@pytest.fixture(autouse=True)
def built() -> None:
    available, reason = native.availability()
    assert available, reason


def both(repeated: Repeated) -> list[Tensor | None]:
    """Outputs and gradients."""
    outputs = repeated.forward()
    return [*outputs, *repeated.gradients(outputs)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_replayed_call_has_the_bits_of_pythons(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated = Repeated(case, device=torch.device("cuda"))
    repeated.learn()
    assert "HyperConnection" in repeated.forward()[0].grad_fn.name()
    found = both(repeated)
    python_only(monkeypatch)
    assert repeated.forward()[0].grad_fn.name() == "FusedBackward"
    same(found, both(repeated))


def test_replayed_calls_are_captured() -> None:
    repeated = Repeated(CASES[0], device=torch.device("cuda"))
    leaves = list(repeated.leaves.values())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def forward_backward() -> list[Tensor]:
        outputs = repeated.forward()
        return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]

    with torch.cuda.stream(stream):
        grads = [torch.randn_like(output) for output in repeated.forward()]
        for _ in range(3):
            expected = forward_backward()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = forward_backward()
    for tensor in captured:
        tensor.detach().fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    same(captured, expected)
