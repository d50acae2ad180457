"""What a repeated call costs the host, counted: launches, allocations, views and calls of Python.

Counts and not times: a machine that is busy changes none of them.
"""

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from helpers.fused import Case
from helpers.repeated import Repeated
from helpers.stand_in_driver import plans_of_its_own
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mhc_megatron import kernels
from mhc_megatron.branch_norm import BranchNorm
from mhc_megatron.config import MHCConfig
from mhc_megatron.hyper_connection import HyperConnection
from mhc_megatron.kernels import MappingOptions, backends, functional
from mhc_megatron.kernels.native.programs import Programs
from mhc_megatron.kernels.triton import compiled, plan
from mhc_megatron.kernels.triton.compiled import Kind, Launch, Prepared

ALLOCATIONS = ("aten.empty.memory_format", "aten.empty_like.default")
KERNELS = str(Path(kernels.__file__).parent)
# Calls of this package's functions, and of C's by them, for a forward and its backward; of ``post``
# one more.
MOST_CALLS = {"post_pre": 122, "single_pass": 122, "pre": 101, "post": 56}
# What a hyper-connection may add to a forward, torch's calls of modules included.
MODULE_CALLS = 25
FORWARD = ["split_weight", "mix_fwd"]
BACKWARD = ["mix_bwd", "weight_bwd", "reduce_partials", "streams_bwd"]
WIDE_FORWARD = ["split_wide", "post_fwd", "project_fwd", "read_fwd"]
WIDE_BACKWARD = ["mix_bwd", "wide_pre_bwd", "reduce_partials", "wide_streams_bwd"]


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


class Calls:
    """Counts calls of functions of files below ``folder``, and of C's by them.

    Garbage is not collected meanwhile: whoever watches an object of an earlier test would be called
    as well.
    """

    def __init__(self, folder: str = KERNELS) -> None:
        self.folder = folder
        self.callers: Counter[str] = Counter()

    @property
    def count(self) -> int:
        return self.callers.total()

    def __enter__(self) -> "Calls":
        gc.disable()
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        gc.enable()

    def _see(self, frame: FrameType, event: str, _: object) -> None:
        if event in ("call", "c_call") and frame.f_code.co_filename.startswith(self.folder):
            self.callers[f"{frame.f_code.co_filename}:{frame.f_code.co_name}"] += 1


class Handle:
    """Stands for a compiled kernel; launched, it leaves its name."""

    function = packed_metadata = None
    metadata = Mock(shared=0)

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name = name
        self.launched = launched

    def run(self, *_: object) -> None:
        self.launched.append(self.name)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that are launched without Triton, as compiled ones; none runs."""
    names: list[str] = []
    monkeypatch.setattr(compiled, "InterpretedFunction", ())
    monkeypatch.setattr(plan, "INTERPRETED", False)
    monkeypatch.setattr(backends, "_obstacle", lambda *_: None)
    monkeypatch.setattr(compiled, "driver", Mock(active=Mock(get_current_stream=lambda _: 0)))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(
        Launch, "_launch_by_triton", lambda launch, *_: Handle(launch.kernel.fn.__name__, names)
    )
    # Python's launches are counted, not the extension's.
    monkeypatch.setattr(Programs, "of", lambda *_: None)
    with plans_of_its_own(monkeypatch):
        yield names


def repeated_call(operation: str, *, norm: bool = False, n: int = 4) -> Repeated:
    """On the CPU, where all of it is on one thread."""
    case = Case(operation=operation, n=n, dtype=torch.bfloat16, norm=norm)
    repeated = Repeated(case, through=False)
    for _ in range(2):
        backward(repeated, repeated.forward())
    return repeated


def backward(repeated: Repeated, outputs: list[Tensor]) -> None:
    gradients = [torch.ones_like(output) for output in outputs]
    torch.autograd.grad(outputs, list(repeated.leaves.values()), gradients)


def counted(launches: list[str], call: Callable[[], Any]) -> tuple[list[str], dict[str, int], Any]:
    """The kernels and operations of a call, and what it returned."""
    launches.clear()
    with Operations() as operations:
        returned = call()
    # Autograd's own, of what it hands over; and the gradients that are given.
    for name in ("aten.detach.default", "aten.ones_like.default"):
        operations.counts.pop(name, None)
    return list(launches), dict(operations.counts), returned


@pytest.mark.parametrize("n", [4, 8])
@pytest.mark.parametrize(
    ("operation", "norm"), [("post_pre", False), ("single_pass", False), ("post_pre", True)]
)
def test_a_boundary_launches_six_kernels_and_allocates_twelve_times(
    operation: str, norm: bool, n: int, launches: list[str]
) -> None:
    """And three times more with a norm, for which there is no other operation.

    Of eight streams three more kernels, and sums that programs share instead of phi's chunks.
    """
    repeated, wide = repeated_call(operation, norm=norm, n=n), n == 8
    kernels, operations, outputs = counted(launches, repeated.forward)
    assert kernels == (WIDE_FORWARD if wide else FORWARD)
    # phi in two parts and in chunks, the streams, u, the raw logits and the mappings; the norm's
    # 1/RMS.
    assert operations == {"allocations": 6 + norm}
    kernels, operations, _ = counted(launches, lambda: backward(repeated, outputs))
    assert kernels == (WIDE_BACKWARD if wide else BACKWARD)
    # Of phi, streams, branch, mappings, and of the small parameters together; and what the kernels
    # leave to each other. Of the norm's input and weight.
    assert operations == {
        "allocations": 6 + 2 * norm,
        "aten.split_with_sizes.default": 1,
    }


@pytest.mark.parametrize("operation", MOST_CALLS)
def test_the_calls_of_a_repeated_call_are_few(operation: str, launches: list[str]) -> None:
    repeated = repeated_call(operation)
    with Calls() as calls:
        backward(repeated, repeated.forward())
    assert launches
    assert calls.count <= MOST_CALLS[operation]


def test_a_module_calls_little_more_than_the_kernels_do(launches: list[str]) -> None:
    """A boundary's forward with the norm of the next branch, as a layer makes it."""
    mhc = MHCConfig(backend="triton")
    ending, following = (HyperConnection(mhc, hidden_size=16, sublayer=k) for k in (0, 1))
    norm, streams = BranchNorm(16), torch.randn(3, 2, 64, requires_grad=True)
    branch, mix = ending.pre(streams)
    weight, gates, bias, _ = following()

    def of_the_kernels() -> None:
        functional.post_pre(
            streams,
            branch,
            mix,
            weight,
            gates,
            bias,
            options=following._options,
            norm_weight=norm.weight,
            norm_eps=norm.eps,
            num_streams=4,
            backend="triton",
        )

    def of_the_module() -> None:
        ending.post_pre(streams, branch, mix, following, norm=norm)

    seen = []
    for call in (of_the_kernels, of_the_module):
        for _ in range(2):
            call()
        with Calls("") as calls:
            call()
        seen.append(calls)
    assert launches
    fused, module = seen
    assert module.count - fused.count <= MODULE_CALLS, module.callers - fused.callers


@pytest.mark.parametrize("forgotten", ["checks", "kernels"])
def test_the_calls_are_more_where_something_is_looked_up_anew(
    forgotten: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated = repeated_call("post_pre")
    if forgotten == "checks":
        monkeypatch.setattr(functional, "signature_of", lambda *_: None)
    else:
        monkeypatch.setattr(plan.Plan, "stream", lambda _: None)
    with Calls() as calls:
        backward(repeated, repeated.forward())
    assert calls.count > MOST_CALLS["post_pre"] + 20


def test_a_wrong_operand_is_named_after_right_ones(launches: list[str]) -> None:
    repeated = repeated_call("post_pre")
    right = dict(repeated.leaves)
    for name, wrong, message in (
        ("streams", right["streams"].transpose(0, 1), r"branch: expected shape"),
        ("branch", right["branch"][:, :8], r"branch: expected shape"),
        ("packed", right["packed"].double(), r"mix: expected torch.float32"),
        ("weight", right["weight"].t(), r"weight: expected shape"),
        ("alpha_post", right["alpha_post"].double(), r"alpha_post: expected torch.float32"),
        ("bias", torch.zeros(48)[::2], r"bias: expected contiguous memory"),
    ):
        repeated.leaves = {**right, name: wrong}
        with pytest.raises(ValueError, match=message):
            repeated.forward()
    repeated.leaves = right
    repeated.forward()


def test_each_call_has_the_plan_of_its_own_options(launches: list[str]) -> None:
    repeated = repeated_call("post_pre")
    case = repeated.case
    plans = functional._boundary_plans._found
    assert len(plans) == 1
    for options in (
        MappingOptions(projection="sinkhorn_v4", iterations=3, eps=1e-3, rms_eps=1e-2),
        MappingOptions(iterations=4, eps=1e-3, rms_eps=1e-2),
        MappingOptions(iterations=3, eps=1e-4, rms_eps=1e-2),
        MappingOptions(iterations=3, eps=1e-3, rms_eps=1e-3),
    ):
        repeated.case = Case(operation="post_pre", dtype=torch.bfloat16, options=options)
        repeated.forward()
    repeated.case = case
    repeated.forward()
    assert len(plans) == 5
    assert len({id(one) for one in plans.values()}) == 5


@pytest.mark.parametrize("operation", MOST_CALLS)
def test_kernels_are_given_gradients_in_the_dtypes_that_they_were_compiled_for(
    operation: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which a prepared launch does not look at: autograd casts what it is given."""
    repeated = repeated_call(operation)
    seen: list[Kind] = []
    call = Prepared.__call__

    def spy(launch: Prepared, stream: int | None, *tensors: Tensor | None) -> None:
        seen.append(tuple(None if tensor is None else tensor.dtype for tensor in tensors))
        call(launch, stream, *tensors)

    monkeypatch.setattr(Prepared, "__call__", spy)
    leaves = list(repeated.leaves.values())
    for dtype in (None, torch.float64):
        outputs = repeated.forward()
        gradients = [torch.ones_like(output, dtype=dtype) for output in outputs]
        torch.autograd.grad(outputs, leaves, gradients)
    half = len(seen) // 2
    assert half
    assert seen[:half] == seen[half:]
