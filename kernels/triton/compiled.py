"""Launches at little cost to the host: compiled kernels are remembered by what they depend on.

Triton binds and inspects every argument at every launch; at the 20 to 35 arguments of these
kernels the host then needs longer than the GPU.
"""

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor


class CompiledKernels:
    """A Triton kernel, launched like it: ``kernel[grid](*arguments, num_warps=..., **constants)``.

    Arguments at run time are positional, and the ``constexpr`` ones keywords, each in the order of
    the kernel's parameters. The first launch of a kind compiles through Triton; the next ones of
    the same kind call what it returned. A kind is whatever Triton specialises for: the constants,
    dtypes, None, pointers and integers that are multiples of 16, integers that are 1 or wide.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._interpreted = not isinstance(kernel, triton.JITFunction)
        self._handles: dict[tuple[Any, ...], Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self._launch, grid)

    def _launch(
        self,
        grid: tuple[int, ...],
        *arguments: Tensor | float | None,
        num_warps: int,
        **constants: Any,
    ) -> None:
        if self._interpreted:
            self.kernel[grid](*arguments, num_warps=num_warps, **constants)
            return
        values: list[Any] = []
        kind: list[Any] = [torch.cuda.current_device(), num_warps, *constants.values()]
        for argument in arguments:
            if isinstance(argument, Tensor):
                pointer = argument.data_ptr()
                values.append(pointer)
                kind.append(argument.dtype)
                kind.append(pointer % 16 == 0)
            else:
                values.append(argument)
                if isinstance(argument, int):
                    kind.append((argument == 1, argument % 16 == 0, argument.bit_length() > 31))
                else:
                    kind.append(argument is None)
        handle = self._handles.get(key := tuple(kind))
        if handle is None:
            names = self.kernel.arg_names[len(arguments) :]
            if names != list(constants):
                raise TypeError(f"{self.kernel.__name__}: constants {list(constants)}, not {names}")
            self._handles[key] = self.kernel[grid](*arguments, num_warps=num_warps, **constants)
            return
        handle[(*grid, 1, 1)[:3]](*values, *constants.values())
