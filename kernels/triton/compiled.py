"""Launches at little cost to the host: compiled kernels are remembered by what they depend on.

Triton binds and inspects every argument at every launch; at the 20 to 35 arguments of these
kernels the host then needs longer than the GPU.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from mhc_megatron.kernels.triton.tape import Tape

Kind = tuple[Any, ...]
# A compiled kernel, and its ``run``, ``function`` and ``packed_metadata``, by which it is launched.
Handle = tuple[Any, Any, Any, Any]

# Where Triton keeps the hooks of profilers; they moved in Triton 3.4.
HOOKS: Any = triton.knobs.runtime if hasattr(triton, "knobs") else CompiledKernel


class Launch:
    """A Triton kernel with its constants: ``launch(grid, tensors, numbers)``.

    The first launch of a kind compiles through Triton; the next ones of the same kind call what
    it returned. Interpreted kernels are launched by Triton, which compiles nothing.

    Args:
        kernel: its parameters are tensors (or None), then numbers, then ``constexpr`` ones.
        num_warps: of a program.
        num_stages: of its loops that name none; None for Triton's default.
        constants: the ``constexpr`` parameters, in the kernel's order.
    """

    def __init__(
        self,
        kernel: Any,
        *,
        num_warps: int,
        num_stages: int | None = None,
        **constants: Any,
    ) -> None:
        names = kernel.arg_names[-len(constants) :]
        if names != list(constants):
            raise TypeError(f"{kernel.__name__}: constants {list(constants)}, not {names}")
        self.kernel = kernel
        self.options = {"num_warps": num_warps}
        if num_stages is not None:
            self.options["num_stages"] = num_stages
        self.constants = constants
        self._interpreted = isinstance(kernel, InterpretedFunction)
        self.values = tuple(constants.values())
        self._handles: dict[Kind, Handle] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        tensors: Sequence[Tensor | None],
        numbers: Sequence[float] = (),
    ) -> Handle | None:
        """What was compiled for this kind, if anything was."""
        if self._interpreted:
            self._launch_by_triton(grid, tensors, numbers)
            return None
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        # What torch.cuda.current_device asks, where CUDA is known to be initialised.
        device = torch._C._cuda_getDevice()
        kind = device, kind_of(tensors, pointers, numbers)
        known = self._handles.get(kind)
        if known is None:
            handle = self._launch_by_triton(grid, tensors, numbers)
            if handle is None:
                return None
            # As CompiledKernel's own launch takes them, at every launch.
            known = handle, handle.run, handle.function, handle.packed_metadata
            self._handles[kind] = known
            return known
        handle, run, function, metadata = known
        x, y, z = (*grid, 1, 1)[:3]
        arguments = (*pointers, *numbers, *self.values)
        if is_observed():
            handle[x, y, z](*arguments)
        else:
            stream = driver.active.get_current_stream(device)
            run(x, y, z, stream, function, metadata, None, None, None, *arguments)
        return known

    def _launch_by_triton(
        self, grid: tuple[int, ...], tensors: Sequence[Tensor | None], numbers: Sequence[float]
    ) -> Any:
        """The compiled kernel; None where there is none, as of a hook that compiles nothing."""
        return self.kernel[grid](*tensors, *numbers, **self.options, **self.constants)


class Part(NamedTuple):
    """A piece of a float32 buffer: ``size`` numbers of ``dtype`` from byte ``first`` on, a multiple
    of 16."""

    first: int
    size: int
    dtype: torch.dtype

    def of(self, buffer: Tensor) -> Tensor:
        """The piece, [size]."""
        numbers: Tensor = buffer[self.first // buffer.itemsize :].view(self.dtype)
        return numbers[: self.size]


class Prepared:
    """A launch that is always the same but for the addresses of its tensors.

    Whose dtypes, and which are None, are the same at every call; kinds then differ in alignment
    alone, and the one of multiples of 16 bytes is remembered.

    Args:
        launch: the kernel.
        grid, numbers: as for it.
        parts: of parameters of the kernel that take a piece of a buffer, by name: what is given for
            them is the whole buffer, whose address costs less than a view.
        unaligned: a kernel that does the same, and is launched instead where an address is no
            multiple of 16; of the tensors it takes those that it has parameters for, by name.
    """

    __slots__ = (
        "_grid",
        "_handle",
        "_known",
        "_launch",
        "_numbers",
        "_parts",
        "_shifts",
        "_tail",
        "_unaligned",
    )

    def __init__(
        self,
        launch: Launch,
        grid: tuple[int, ...],
        numbers: tuple[float, ...] = (),
        parts: dict[str, Part] | None = None,
        unaligned: Launch | None = None,
    ) -> None:
        self._launch = launch
        self._unaligned = unaligned
        self._grid = (*grid, 1, 1)[:3]
        self._numbers = numbers
        self._tail = (*numbers, *launch.values)
        names = launch.kernel.arg_names
        self._parts = {names.index(name): part for name, part in (parts or {}).items()}
        self._shifts = [(index, part.first) for index, part in self._parts.items() if part.first]
        self._known: tuple[Any, ...] | None = None
        self._handle: Any = None

    def __call__(self, stream: int | Tape | None, *tensors: Tensor | None) -> None:
        """On ``stream``, of ``current_stream``; a tape takes the launch down."""
        known = self._known
        if known is None or stream.__class__ is not int:
            if isinstance(stream, Tape):
                name, shifts = self._launch.kernel.__name__, dict(self._shifts)
                stream.take(name, self._handle, self._grid, tensors, shifts, self._numbers)
            else:
                self._look_up(tensors)
            return
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        low_bits = 0
        for pointer in pointers:
            if pointer is not None:
                low_bits |= pointer
        if low_bits & 15:
            self._look_up(tensors)
            return
        for index, shift in self._shifts:
            pointers[index] += shift
        run, x, y, z, function, metadata = known
        run(x, y, z, stream, function, metadata, None, None, None, *pointers, *self._tail)

    def _look_up(self, tensors: tuple[Tensor | None, ...]) -> None:
        given = list(tensors)
        for index, part in self._parts.items():
            buffer = given[index]
            assert buffer is not None
            given[index] = part.of(buffer)
        aligned = all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in given)
        if not aligned and self._unaligned is not None:
            named = dict(zip(self._launch.kernel.arg_names, given, strict=False))
            wanted = [name for name in self._unaligned.kernel.arg_names if name in named]
            self._unaligned(self._grid, [named[name] for name in wanted], self._numbers)
            return
        handle = self._launch(self._grid, given, self._numbers)
        if handle is not None and aligned:
            self._handle, run, function, metadata = handle
            self._known = (run, *self._grid, function, metadata)


def current_stream(device: torch.device) -> int | None:
    """CUDA's current stream of ``device``; None where a profiler wants to be told of launches."""
    if is_observed():
        return None
    stream: int = driver.active.get_current_stream(device.index)
    return stream


def is_observed() -> bool:
    """Whether a profiler wants to be told of launches."""
    enter, leave = HOOKS.launch_enter_hook, HOOKS.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def kind_of(
    tensors: Sequence[Tensor | None], pointers: Sequence[int | None], numbers: Sequence[float]
) -> Kind:
    """Whatever Triton compiles another kernel for, but the constants.

    These are dtypes, None, which pointers and integers are multiples of 16, integers that are 1,
    and those that need 64 bits.

    Args:
        tensors: arguments at run time; ``pointers`` are their addresses.
        numbers: the other ones.
    """
    kind: list[Any] = [tensor if tensor is None else tensor.dtype for tensor in tensors]
    low_bits = 0
    for pointer in pointers:
        if pointer is not None:
            low_bits |= pointer
    if low_bits % 16:
        kind.append(tuple([pointer is None or pointer % 16 == 0 for pointer in pointers]))
    kind.append(_kind_of_numbers(*numbers))
    return tuple(kind)


# Typed: 1 and 1.0 are equal, and other kernels. T varies, the rest seldom.
@lru_cache(maxsize=4096, typed=True)
def _kind_of_numbers(*numbers: float) -> Kind:
    return tuple(
        (number == 1, number % 16 == 0, number.bit_length() > 31)
        if isinstance(number, int)
        else None
        for number in numbers
    )
