"""What a pass would allocate and launch, taken down instead of done; ``kernels/native`` replays it.

A tape is given to the launches of a pass in the place of a stream. What they are given are its
inputs, memory that the pass allocates, and constants of the plan: each becomes a slot or a number,
so that the pass can be done again with other tensors of the same kinds. Inputs and allocations are
stand-ins without memory: there may be none left.
"""

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# What a pass may do beside launching: allocate without filling, and look at what it allocated.
_ALLOCATES = ("aten.empty.memory_format", "aten.empty_like.default")
_VIEWS = ("aten.split_with_sizes.default", "aten.detach.default", "aten.view.default")
# Of a parameter of a compiled kernel that is no pointer.
_FORMATS = {"i32": "<iI", "i64": "<q", "fp32": "<fI"}
# Threads of a warp.
_WARP = 32


class NotTaken(Exception):
    """A pass that cannot be taken down, and why."""


class NotYetTaken(NotTaken):
    """One of whose kernels has not been launched."""


class Step(NamedTuple):
    """A launch.

    Attributes:
        name: of the kernel.
        function: its handle in CUDA.
        grid, threads, shared: of the launch; bytes of shared memory.
        arguments: (slot, bytes behind its address), or (-1, the bits of a number or an address).
    """

    name: str
    function: int
    grid: tuple[int, ...]
    threads: int
    shared: int
    arguments: list[tuple[int, int]]


class Tape:
    """What is done within a ``with`` of it.

    Attributes:
        inputs: stand-ins for those that it is made of, or None: its first slots; allocations are
            the next.
    """

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        self.inputs = [None if given is None else _stand_in(given) for given in inputs]
        self.steps: list[Step] = []
        self._slots = {
            id(tensor): slot for slot, tensor in enumerate(self.inputs) if tensor is not None
        }
        # By their storage: they come back as other objects, and as views.
        self._allocated: dict[int, tuple[int, Tensor]] = {}

    def __enter__(self) -> "Tape":
        self._seen = _Allocations(self)
        self._seen.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._seen.__exit__(*error)

    def allocated(self, tensor: Tensor) -> None:
        """A slot of its own."""
        slot = len(self.inputs) + len(self._allocated)
        self._allocated[_storage(tensor)] = slot, tensor

    def take(
        self,
        name: str,
        handle: Any,
        grid: tuple[int, ...],
        tensors: Sequence[Tensor | None],
        shifts: dict[int, int],
        numbers: Sequence[float],
    ) -> None:
        """A launch of a compiled kernel, ``handle``; ``shifts`` are bytes behind the addresses of
        some of ``tensors``.

        Raises:
            NotYetTaken: it is not compiled yet.
            NotTaken: it is launched in a way that is not replayed, or with memory from elsewhere.
        """
        if handle is None:
            raise NotYetTaken(name)
        kinds = list(handle.src.signature.values())
        arguments = []
        for index, tensor in enumerate(tensors):
            if kinds[index] == "constexpr":
                continue
            assert tensor is not None
            slot, offset = self._address_of(tensor)
            arguments.append((slot, offset + shifts.get(index, 0)))
        for kind, number in zip(kinds[len(tensors) :], numbers, strict=False):
            if kind != "constexpr":
                arguments.append((-1, bits_of(name, kind, number)))
        self.steps.append(
            Step(
                name,
                handle.function,
                grid,
                threads_of(name, handle.metadata),
                handle.metadata.shared,
                arguments,
            )
        )

    @property
    def allocations(self) -> list[tuple[list[int], torch.dtype]]:
        return [(list(tensor.shape), tensor.dtype) for _, tensor in self._allocated.values()]

    def place_of(self, tensor: Tensor | None) -> tuple[int, list[int], list[int], int]:
        """Of a result: its slot, or -1, and of a part of an allocation sizes, strides and offset.

        Raises:
            NotTaken: it is neither an input nor allocated.
        """
        if tensor is None:
            return -1, [], [], 0
        if id(tensor) in self._slots:
            return self._slots[id(tensor)], [], [], 0
        found = self._allocated.get(_storage(tensor))
        if found is None or found[1].dtype != tensor.dtype:
            raise NotTaken("a result is neither an input nor allocated")
        slot, whole = found
        if whole.shape == tensor.shape:
            return slot, [], [], 0
        return slot, list(tensor.shape), list(tensor.stride()), int(tensor.storage_offset())

    def _address_of(self, tensor: Tensor) -> tuple[int, int]:
        """Its slot and bytes behind the slot's address, or -1 and its own address."""
        if id(tensor) in self._slots:
            return self._slots[id(tensor)], 0
        found = self._allocated.get(_storage(tensor))
        if found is not None:
            return found[0], int(tensor.storage_offset()) * tensor.itemsize
        if tensor.is_meta:
            raise NotTaken("an operand is neither an input nor allocated")
        # It is the plan's, which keeps it.
        return -1, tensor.data_ptr()


def _stand_in(tensor: Tensor) -> Tensor:
    """Contiguous, as what kernels are given."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Allocations(TorchDispatchMode):
    """Tells a tape what is allocated, without memory, and refuses all other work."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func)
        if name not in _ALLOCATES + _VIEWS:
            raise NotTaken(f"{name} is no launch of a plan")
        if name in _ALLOCATES:
            kwargs = {**(kwargs or {}), "device": torch.device("meta")}
        result = func(*args, **(kwargs or {}))
        if name in _ALLOCATES:
            self._tape.allocated(result)
        return result


def bits_of(name: str, kind: str, number: float) -> int:
    """The eight bytes of a kernel's parameter.

    Raises:
        NotTaken: the kind is none that the kernels of plans have.
    """
    layout = _FORMATS.get(kind)
    if layout is None:
        raise NotTaken(f"{name} takes a number of kind {kind}")
    packed = struct.pack(layout, *((number, 0) if len(layout) == 3 else (number,)))
    bits: int = struct.unpack("<Q", packed)[0]
    return bits


def threads_of(name: str, metadata: Any) -> int:
    """Of a program.

    Raises:
        NotTaken: a launch has more to it than grid, threads and shared memory.
    """
    plain = (
        getattr(metadata, "num_ctas", 1) == 1
        and not getattr(metadata, "launch_pdl", False)
        and not getattr(metadata, "launch_cooperative_grid", False)
        and not getattr(metadata, "global_scratch_size", 0)
        and not getattr(metadata, "profile_scratch_size", 0)
    )
    if not plain:
        raise NotTaken(f"{name} is launched with clusters, or scratch memory of Triton's")
    threads: int = metadata.num_warps * _WARP
    return threads
