"""Gluon's kernels on Triton's interpreter, which knows no Gluon: what they compute, not how fast.

Layouts mean nothing here. What has to be waited for does: a copy to shared memory is there when its
group has been waited for, what is stored there reaches tensor cores behind a fence, and a product
reads its factors when it is waited for. Before that, and once another copy has begun, its place
holds NaN. What a barrier between threads is for is not seen.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import triton
import triton.experimental
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, TensorHandle

from helpers.stand_in_driver import plans_of_its_own
from mhc_megatron.kernels.triton import buffers, hopper
from mhc_megatron.kernels.triton.tile_math import dot

# The kernel of each file, behind those that it imports; all import hopper_tiles.py.
FILES = {
    "hopper_mix_forward": "hopper_mix_fwd",
    "hopper_pre_backward": "hopper_pre_bwd",
    "hopper_weight_backward": "hopper_weight_bwd",
}
GLUON = "triton.experimental.gluon"
KERNELS = "mhc_megatron.kernels.triton"
NAN = 0x7FC0  # of bfloat16, which the interpreter has in 16 bits without sign


def tensor(data: np.ndarray, dtype: tl.dtype) -> tl.tensor:
    return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, list(data.shape)))


def number(value: Any) -> int:
    """Of a whole number of the kernel's."""
    return int(value.handle.data.item()) if isinstance(value, tl.tensor) else int(value)


class SharedMemory:
    """A view of numbers: as threads see them, and as tensor cores do."""

    def __init__(self, dtype: tl.dtype, seen: np.ndarray, multiplied: np.ndarray) -> None:
        self.dtype, self.seen, self.multiplied = dtype, seen, multiplied
        self.shape = list(seen.shape)

    def _view(self, of: Callable[[np.ndarray], np.ndarray]) -> "SharedMemory":
        return SharedMemory(self.dtype, of(self.seen), of(self.multiplied))

    def index(self, place: Any) -> "SharedMemory":
        at = number(place)
        assert 0 <= at < self.shape[0], (at, self.shape)
        return self._view(lambda data: data[at])

    def slice(self, start: Any, length: Any, dim: int = 0) -> "SharedMemory":
        first, last = number(start), number(start) + number(length)
        assert first >= 0 and last <= self.shape[dim], (first, last, self.shape)
        return self._view(lambda data: data[(*[slice(None)] * dim, slice(first, last))])

    def permute(self, order: tuple[int, ...]) -> "SharedMemory":
        return self._view(lambda data: data.transpose(order))

    def load(self, layout: object) -> tl.tensor:
        return tensor(self.seen.copy(), self.dtype)

    def store(self, value: tl.tensor) -> None:
        assert value.dtype == self.dtype and list(value.shape) == self.shape
        self.seen[...] = value.handle.data
        self.multiplied[...] = NAN
        STATE.unfenced.append(self)


class State:
    """Of the program that runs."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.copies: list[tuple[SharedMemory, np.ndarray]] = []
        self.groups: list[list[tuple[SharedMemory, np.ndarray]]] = []
        self.unfenced: list[SharedMemory] = []
        self.products: list[Product] = []


STATE = State()


def allocate(dtype: tl.dtype, shape: list, layout: object) -> SharedMemory:
    assert dtype == tl.bfloat16
    seen, multiplied = (np.full([number(size) for size in shape], NAN, np.uint16) for _ in "12")
    return SharedMemory(dtype, seen, multiplied)


def begin_copy(place: SharedMemory, pointers: tl.tensor, mask: tl.tensor | None = None) -> None:
    values = tl.load(pointers, mask=mask, other=None if mask is None else 0.0)
    assert values.dtype == place.dtype and list(values.shape) == place.shape
    place.seen[...] = place.multiplied[...] = NAN
    STATE.copies.append((place, values.handle.data.copy()))


def commit_group() -> None:
    STATE.groups.append(STATE.copies)
    STATE.copies = []


def wait_group(outstanding: Any) -> None:
    for _ in range(len(STATE.groups) - number(outstanding)):
        for place, values in STATE.groups.pop(0):
            place.seen[...] = values
            STATE.unfenced.append(place)


def fence_async_shared() -> None:
    for place in STATE.unfenced:
        place.multiplied[...] = place.seen
    STATE.unfenced.clear()


class Product:
    """A sum that runs, ``sums + left @ right``; its number when it has been waited for."""

    def __init__(self, left: SharedMemory, right: SharedMemory, sums: Any) -> None:
        self.left, self.right, self.sums = left, right, sums
        self.result: tl.tensor | None = None

    def finish(self) -> None:
        left, right = (
            tensor(factor.multiplied.copy(), factor.dtype) for factor in (self.left, self.right)
        )
        self.result = dot(left, right, value_of(self.sums), "ieee")


def value_of(sums: Any) -> Any:
    if not isinstance(sums, Product):
        return sums
    assert sums.result is not None, "a product is used that has not been waited for"
    return sums.result


def warpgroup_mma(
    left: SharedMemory, right: SharedMemory, sums: Any, use_acc: Any = True, is_async: Any = False
) -> Any:
    if not getattr(use_acc, "value", use_acc):
        sums = tl.zeros([left.shape[0], right.shape[1]], tl.float32)
    product = Product(left, right, sums)
    STATE.products.append(product)
    return product if is_async else warpgroup_mma_wait(0, (product,))


def warpgroup_mma_wait(num_outstanding: Any, deps: tuple) -> Any:
    for _ in range(len(STATE.products) - number(num_outstanding)):
        STATE.products.pop(0).finish()
    found = tuple(value_of(sums) for sums in deps)
    return found[0] if len(found) == 1 else tl.tuple(found)


class Kernel(InterpretedFunction):
    """With its annotations as they are: Triton looks for "tl.constexpr" in their text."""

    def rewrite(self) -> Callable[..., Any]:
        rewritten = super().rewrite()
        rewritten.__annotations__ = self.fn.__annotations__
        return rewritten


def unmeant(*_: object, **__: object) -> None:
    """A layout."""


def language() -> ModuleType:
    """``triton.experimental.gluon.language`` in Triton's own words, as they are when called."""

    def word(name: str) -> Callable[..., Any]:
        def call(*given: Any, layout: object = None, **named: Any) -> Any:
            return getattr(tl, name)(*given, **named)

        return call

    module = ModuleType(f"{GLUON}.language")
    names = "arange load store zeros sum fma minimum reshape permute program_id static_range"
    for name in names.split():
        setattr(module, name, word(name))
    for name in ("constexpr", "float32", "bfloat16", "int32", "int64"):
        setattr(module, name, getattr(tl, name))
    layouts = "BlockedLayout SliceLayout NVMMASharedLayout SwizzledSharedLayout"
    for name in (*layouts.split(), "NVMMADistributedLayout", "DistributedLinearLayout"):
        setattr(module, name, unmeant)
    module.num_warps = lambda: 4  # type: ignore[attr-defined]
    module.barrier = lambda: None  # type: ignore[attr-defined]
    module.allocate_shared_memory = allocate  # type: ignore[attr-defined]
    module.convert_layout = lambda tile, *_, **__: tile  # type: ignore[attr-defined]
    return module


def stand_ins() -> dict[str, ModuleType]:
    modules = {}

    def module(name: str, **contents: Any) -> None:
        modules[name] = ModuleType(name)
        vars(modules[name]).update(contents)

    words = language()
    module(GLUON, jit=Kernel, constexpr_function=lambda function: function, language=words)
    modules[words.__name__] = words
    copy = SimpleNamespace(
        async_copy_global_to_shared=begin_copy, commit_group=commit_group, wait_group=wait_group
    )
    module(f"{words.__name__}.nvidia")
    module(f"{words.__name__}.nvidia.ampere", async_copy=copy)
    module(
        f"{words.__name__}.nvidia.hopper",
        fence_async_shared=fence_async_shared,
        warpgroup_mma=warpgroup_mma,
        warpgroup_mma_init=lambda sums: sums,
        warpgroup_mma_wait=warpgroup_mma_wait,
    )
    return modules


def interpreted(paths: dict[str, Path]) -> dict[str, Kernel]:
    """Hopper's kernels by name, for the interpreter: of their own files, or of ``paths``."""
    STATE.clear()
    modules, package = stand_ins(), importlib.import_module(KERNELS)
    kernels = {}
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.dict(vars(package)),
        mock.patch.object(triton.experimental, "gluon", modules[GLUON], create=True),
    ):
        for name in ("hopper_tiles", *FILES):
            own = f"{KERNELS}.{name}"
            path = paths.get(name) or Path(hopper.__file__).with_name(f"{name}.py")
            spec = spec_from_file_location(own, path)
            assert spec is not None and spec.loader is not None
            module = sys.modules[own] = module_from_spec(spec)
            spec.loader.exec_module(module)
            if name in FILES:
                kernels[FILES[name]] = getattr(module, FILES[name])
    return kernels


@contextmanager
def hopper_interpreted(
    monkeypatch: pytest.MonkeyPatch, paths: dict[str, Path] | None = None
) -> Iterator[list[str]]:
    """Operations of CPU tensors launch Hopper's kernels, whose names are in what this yields.

    ``paths``: other files than the modules' own, by their names.
    """
    launched: list[str] = []

    def run(kernel: Kernel, *given: Any, **named: Any) -> None:
        launched.append(kernel.__name__)
        InterpretedFunction.run(kernel, *given, **named)

    monkeypatch.setattr(Kernel, "run", run)
    for name, kernel in interpreted(paths or {}).items():
        monkeypatch.setattr(hopper, name, kernel)
    monkeypatch.setattr(hopper, "runs_on", lambda device: True)
    monkeypatch.setattr(buffers, "INTERPRETED", False)
    with plans_of_its_own(monkeypatch):
        yield launched
