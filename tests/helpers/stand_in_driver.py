"""A stand-in for CUDA's driver: launches by address run in Triton's interpreter, on the CPU.

Kernels count as compiled, so that host code takes the ways that it takes on a GPU: Python's
launches by Triton's handles, and those of the extension, which end in a function of this module.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from mhc_megatron.kernels import backends, functional
from mhc_megatron.kernels.known import Known
from mhc_megatron.kernels.native.extension import extension as built
from mhc_megatron.kernels.triton import bound, compiled, hopper_bound, plan
from mhc_megatron.kernels.triton.compiled import Launch

_KINDS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
}
_READ = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    *[ctypes.c_uint] * 7,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
)


class Handle:
    """A kernel as Triton returns it compiled; of the sizes that it was launched with."""

    packed_metadata = None

    def __init__(
        self, driver: "Driver", launch: Launch, tensors: Sequence[Tensor | None], numbers: Any
    ) -> None:
        self.launch = launch
        self.like = [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors]
        kinds = ["constexpr" if one is None else _KINDS[one[1]] for one in self.like]
        kinds += [_kind_of(number) for number in numbers]
        names = launch.kernel.arg_names
        kinds += ["constexpr"] * (len(names) - len(kinds))
        self.numbers = tuple(numbers)
        self.src = SimpleNamespace(signature=dict(zip(names, kinds, strict=True)))
        self.metadata = SimpleNamespace(num_warps=launch.options["num_warps"], shared=1024)
        self.function = driver.know(self)
        self.driver = driver

    @property
    def name(self) -> str:
        return str(self.launch.kernel.fn.__name__)

    @property
    def kinds(self) -> list[str]:
        return list(self.src.signature.values())

    def run(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        """Launched by Python."""
        arguments = rest[5:]
        self.driver.by_python.append(self.name)
        self.interpret((x, y, z), arguments[: len(self.like)], arguments[len(self.like) :])

    def interpret(
        self, grid: tuple[int, int, int], pointers: Sequence[int | None], numbers: Sequence[Any]
    ) -> None:
        tensors = [
            None if like is None else tensor_at(pointer, *like)
            for pointer, like in zip(pointers, self.like, strict=True)
        ]
        count = len(self.numbers)
        launch = self.launch
        launch.kernel[grid](*tensors, *numbers[:count], **launch.options, **launch.constants)


def _kind_of(number: float) -> str:
    if isinstance(number, float):
        return "fp32"
    return "constexpr" if number == 1 else "i32"


def tensor_at(pointer: int | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    assert pointer
    numel = shape.numel()
    memory = (ctypes.c_char * (numel * dtype.itemsize)).from_address(pointer)
    return torch.frombuffer(memory, dtype=dtype, count=numel).view(shape)


class Driver:
    """
    Attributes:
        by_python, by_extension: names of the kernels that were launched, in order.
        scratch: parameters that kernels have behind those that they name.
    """

    def __init__(self) -> None:
        self.handles: list[Handle] = []
        self.by_python: list[str] = []
        self.by_extension: list[str] = []
        self.streams: list[int | None] = []
        self.scratch = 2
        self.error = 0
        self.callback = _LAUNCH(self._launch)

    def know(self, handle: Handle) -> int:
        self.handles.append(handle)
        return len(self.handles)

    def parameters_of(self, function: int) -> list[int]:
        kinds = self.handles[function - 1].kinds
        return [8] * (sum(kind != "constexpr" for kind in kinds) + self.scratch)

    def _launch(self, function: int, *rest: Any) -> int:
        """``cuLaunchKernel``."""
        x, y, z, threads, _, _, shared, stream, parameters, _ = rest
        handle = self.handles[function - 1]
        assert threads == 32 * handle.metadata.num_warps and shared == handle.metadata.shared
        self.by_extension.append(handle.name)
        self.streams.append(stream)
        if self.error:
            return self.error
        given = iter(range(100))
        pointers: list[int | None] = []
        for like in handle.like:
            pointers.append(None if like is None else _at(parameters, next(given), ctypes.c_uint64))
        numbers = []
        for kind, number in zip(handle.kinds[len(pointers) :], handle.numbers, strict=False):
            numbers.append(
                number if kind == "constexpr" else _at(parameters, next(given), _READ[kind])
            )
        for _ in range(self.scratch):
            assert _at(parameters, next(given), ctypes.c_uint64) == 0
        handle.interpret((x, y, z), pointers, numbers)
        return 0


def _at(parameters: Any, index: int, kind: Any) -> Any:
    return ctypes.cast(parameters[index], ctypes.POINTER(kind)).contents.value


@contextmanager
def plans_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """None that was made before is found, and none that is made here is found afterwards."""
    for known in ("_pre_plans", "_post_plans", "_boundary_plans"):
        monkeypatch.setattr(functional, known, Known())
    forget()
    try:
        yield
    finally:
        forget()


def forget() -> None:
    """All plans and launches."""
    plan.planned.cache_clear()
    for kernel in (*vars(bound).values(), *vars(hopper_bound).values()):
        if hasattr(kernel, "cache_clear"):
            kernel.cache_clear()


@contextmanager
def stand_in_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """In the place of CUDA's, for kernels of CPU tensors."""
    driver = Driver()
    extension = built()[0]
    assert extension is not None
    monkeypatch.setattr(compiled, "InterpretedFunction", ())
    monkeypatch.setattr(plan, "INTERPRETED", False)
    monkeypatch.setattr(backends, "_obstacle", lambda *_: None)
    monkeypatch.setattr(compiled, "driver", Mock(active=Mock(get_current_stream=lambda _: 7)))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(extension, "parameters_of", driver.parameters_of)

    def by_triton(launch: Launch, grid: Any, tensors: Any, numbers: Any) -> Handle:
        launch.kernel[grid](*tensors, *numbers, **launch.options, **launch.constants)
        return Handle(driver, launch, tensors, numbers)

    monkeypatch.setattr(Launch, "_launch_by_triton", by_triton)
    with plans_of_its_own(monkeypatch):
        extension.launch_by(ctypes.cast(driver.callback, ctypes.c_void_p).value)
        try:
            yield driver
        finally:
            extension.launch_by(0)
