"""What one call costs the host, counted: launches, allocations and other operations of torch."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.fused import Case, operands
from torch.utils._python_dispatch import TorchDispatchMode

from mhc_megatron.kernels import PackedMappings, functional
from mhc_megatron.kernels.triton.compiled import Launch

ALLOCATIONS = ("aten.empty.memory_format", "aten.empty_like.default")


class Operations(TorchDispatchMode):
    """Counts operations by name; what allocates under one name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func)
        self.counts["allocations" if name in ALLOCATIONS else name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that would be launched; none is."""
    names: list[str] = []
    monkeypatch.setattr(
        Launch, "__call__", lambda launch, *_: names.append(launch.kernel.fn.__name__)
    )
    return names


def counted(launches: list[str], call: Callable[[], Any]) -> tuple[list[str], dict[str, int], Any]:
    """The kernels and operations of a call, and what it returned."""
    launches.clear()
    with Operations() as operations:
        returned = call()
    # Autograd's own, of what it hands over.
    operations.counts.pop("aten.detach.default", None)
    return list(launches), dict(operations.counts), returned


@pytest.mark.parametrize(
    ("operation", "norm"), [("post_pre", False), ("single_pass", False), ("post_pre", True)]
)
def test_a_boundary_launches_six_kernels_and_allocates_twelve_times(
    operation: str, norm: bool, launches: list[str], device: torch.device
) -> None:
    """And four times more with a norm, for which there is no other operation."""
    case = Case(operation=operation, dtype=torch.bfloat16, norm=norm)
    leaves = {
        name: leaf.requires_grad_()
        for name, leaf in operands(case, device).items()
        if leaf is not None and not name.startswith("mix")
    }
    packed = torch.rand(case.n * (case.n + 2), case.tokens, device=device).requires_grad_()
    mix = PackedMappings(packed, case.n, leaves["streams"].shape[:-2])
    more = {"norm_weight": leaves["norm_weight"]} if norm else {}
    gates = (leaves["alpha_pre"], leaves["alpha_post"], leaves["alpha_res"])

    def forward() -> list[torch.Tensor]:
        streams, u, new_mix = getattr(functional, operation)(
            leaves["streams"],
            leaves["branch"],
            mix,
            leaves["weight"],
            gates,
            leaves["bias"],
            options=case.options,
            backend="triton",
            **more,
        )
        return [streams, u, new_mix.packed]

    kernels, operations, outputs = counted(launches, forward)
    assert kernels == ["split_weight", "mix_fwd"]
    # phi in two parts, the streams, u, the raw logits and the mappings; the norm's 1/RMS.
    assert operations == {"allocations": 5 + norm}
    gradients = [torch.ones_like(output) for output in outputs]
    inputs = [*leaves.values(), packed]
    kernels, operations, _ = counted(
        launches, lambda: torch.autograd.grad(outputs, inputs, gradients)
    )
    assert kernels == ["mix_bwd", "weight_bwd", "reduce_partials", "streams_bwd"]
    # Of phi, streams, branch, mappings, and of the small parameters together; one between the
    # kernels in half precision, and one in float32. Of the norm's input and weight, and its sums.
    assert operations == {"allocations": 7 + 3 * norm, "aten.split_with_sizes.default": 2}
