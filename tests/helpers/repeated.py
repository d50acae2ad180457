"""Calls of the fused operations that are repeated, as of a model: host code remembers them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.fused import Case, operands
from mhc_megatron.kernels import PackedMappings, functional
from mhc_megatron.kernels.native import programs


class Repeated:
    """Calls of one operation on the same random numbers.

    Attributes:
        leaves: operands by name, the mappings in one tensor, ``packed``.
        backend: of the calls.
        main_grad: what phi's gradient is added to, or None.
        through: whether the streams that ``pre`` hands on are among its outputs.
    """

    def __init__(
        self,
        case: Case,
        *,
        device: torch.device | None = None,
        main_grad: bool = False,
        through: bool = True,
    ) -> None:
        device = device or torch.device("cpu")
        self.case = case
        self.backend = "triton"
        self.through = through
        self.leaves = {
            name: leaf.requires_grad_()
            for name, leaf in operands(case, device).items()
            if leaf is not None and not name.startswith("mix")
        }
        if case.operation != "pre":
            rows = case.n * (case.n + 2)
            self.leaves["packed"] = torch.rand(rows, case.tokens, device=device).requires_grad_()
        self.main_grad: Tensor | None = None
        if main_grad:
            self.main_grad = torch.randn_like(self.leaves["weight"])

    def forward(self) -> list[Tensor]:
        leaves, case = self.leaves, self.case
        given: list[Any] = [leaves["streams"]]
        keywords: dict[str, Any] = {"backend": self.backend}
        if "packed" in leaves:
            mix = PackedMappings(leaves["packed"], case.n, leaves["streams"].shape[:-2])
            given += [leaves["branch"], mix]
            keywords["branch_bias"] = leaves.get("branch_bias")
        if "weight" in leaves:
            gates = (leaves["alpha_pre"], leaves["alpha_post"], leaves.get("alpha_res"))
            given += [leaves["weight"], gates, leaves["bias"]]
            keywords |= {"options": case.options, "main_grad": self.main_grad}
        if "norm_weight" in leaves:
            keywords["norm_weight"] = leaves["norm_weight"]
        outputs = getattr(functional, case.operation)(*given, **keywords)
        if isinstance(outputs, Tensor):
            return [outputs]
        *states, mix = outputs
        through = [mix.through] if self.through and mix.through is not None else []
        return [*states, mix.packed, *through]

    def gradients(self, outputs: list[Tensor], only: int | None = None) -> list[Tensor | None]:
        """Of all leaves; ``only``: from the gradient of one output."""
        generator = torch.Generator().manual_seed(5)
        grads = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
        chosen = slice(None) if only is None else slice(only, only + 1)
        leaves = list(self.leaves.values())
        return list(torch.autograd.grad(outputs[chosen], leaves, grads[chosen], allow_unused=True))

    def learn(self) -> None:
        """Python's call, and the first one of the extension, whose backward is Python's."""
        for _ in range(2):
            self.gradients(self.forward())
        if self.main_grad is not None:
            self.main_grad.zero_()


def python_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the extension is not built."""
    monkeypatch.setattr(programs.Programs, "run", lambda *_: None)


def same(left: list[Tensor | None], right: list[Tensor | None]) -> None:
    """To the bit, dtypes and shapes too."""
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.dtype == other.dtype and one.shape == other.shape
            assert torch.equal(one, other)
