"""The extension on a GPU: Python's bits, eagerly and as a CUDA graph."""

from typing import Any

import pytest
import torch
from helpers.fused import Case, operands
from torch import Tensor

from mhc_megatron.kernels import PackedMappings, functional, native
from mhc_megatron.kernels.native import programs

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


class Repeated:
    """Forward and backward of one operation on the same numbers."""

    def __init__(self, case: Case) -> None:
        device = torch.device("cuda")
        self.case = case
        self.leaves = {
            name: leaf.requires_grad_()
            for name, leaf in operands(case, device).items()
            if leaf is not None and not name.startswith("mix")
        }
        if case.operation != "pre":
            rows = case.n * (case.n + 2)
            self.leaves["packed"] = torch.rand(rows, case.tokens, device=device).requires_grad_()
        self.grads: list[Tensor] = []

    def forward(self) -> list[Tensor]:
        leaves, case = self.leaves, self.case
        given: list[Any] = [leaves["streams"]]
        keywords: dict[str, Any] = {"backend": "triton"}
        if "packed" in leaves:
            given += [leaves["branch"], PackedMappings(leaves["packed"], case.n, (case.tokens,))]
        if "weight" in leaves:
            gates = (leaves["alpha_pre"], leaves["alpha_post"], leaves["alpha_res"])
            given += [leaves["weight"], gates, leaves["bias"]]
            keywords["options"] = case.options
        if "norm_weight" in leaves:
            keywords["norm_weight"] = leaves["norm_weight"]
        outputs = getattr(functional, case.operation)(*given, **keywords)
        if isinstance(outputs, Tensor):
            return [outputs]
        *states, mix = outputs
        return [*states, mix.packed]

    def both(self) -> list[Tensor]:
        outputs = self.forward()
        if not self.grads:
            self.grads = [torch.randn_like(output) for output in outputs]
        return [*outputs, *torch.autograd.grad(outputs, list(self.leaves.values()), self.grads)]


@pytest.fixture(autouse=True)
def built() -> None:
    available, reason = native.availability()
    assert available, reason


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_replayed_call_has_the_bits_of_pythons(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated = Repeated(case)
    for _ in range(2):
        repeated.both()
    assert "HyperConnection" in repeated.forward()[0].grad_fn.name()
    found = repeated.both()
    monkeypatch.setattr(programs.Programs, "run", lambda *_: None)
    assert repeated.forward()[0].grad_fn.name() == "FusedBackward"
    for one, other in zip(found, repeated.both(), strict=True):
        assert torch.equal(one, other)


def test_replayed_calls_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    repeated = Repeated(CASES[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = repeated.both()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = repeated.both()
    for tensor in captured:
        tensor.detach().fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(captured, expected, strict=True):
        assert torch.equal(one, other)
