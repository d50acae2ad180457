"""Programs of replay.cpp, made of tapes: one for each plan and shape of the streams."""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mhc_megatron.kernels.native.extension import extension
from mhc_megatron.kernels.triton.buffers import Call
from mhc_megatron.kernels.triton.passes import Operation, Tensors
from mhc_megatron.kernels.triton.plan import UNDECIDED, Plan, planned
from mhc_megatron.kernels.triton.tape import NotTaken, NotYetTaken, Tape

_LOGGER = logging.getLogger(__name__)
# Parameters behind those that a kernel names: two pointers to scratch memory, one in Triton 3.3.
_MOST_SCRATCH = 2


class Programs:
    """Of one operation and plan, by the shape of the streams; None where there is no extension.

    A call is replayed from the second of its shape on: the first compiles the kernels.
    """

    def __init__(self, operation: Operation, plan: Plan) -> None:
        self._operation = operation
        self._plan = plan
        self._programs: dict[torch.Size, Any] = {}
        # Looked up once: None, which nothing is found for.
        self._find = self._programs.get

    @classmethod
    def of(cls, operation: Operation, plan: Plan) -> "Programs | None":
        """None also for a plan of no tokens, which launches nothing."""
        if extension()[0] is None or not plan.num_tokens:
            return None
        return cls(operation, plan)

    def run(self, operands: Tensors, main_grad: Tensor | None) -> Any:
        """The operation's results; None where Python has to make them: a profiler wants to be told
        of launches, or the tapes do not fit."""
        stream = self._plan.stream()
        if stream is None:
            return None
        streams = operands[0]
        assert streams is not None
        program = self._find(streams.shape)
        return None if program is None else program(stream, operands, main_grad)

    def learn(self, operands: Tensors) -> None:
        """After a call that Python made."""
        streams = operands[0]
        assert streams is not None
        if self._plan.stream() is None or streams.shape in self._programs:
            return
        try:
            self._programs[streams.shape] = self._program(operands)
        except NotYetTaken:
            return
        except NotTaken as reason:
            _say_once(str(reason))
            self._programs[streams.shape] = None

    def program_of(self, shape: torch.Size) -> Any:
        """What calls of streams of this shape are replayed by, or None."""
        return self._find(shape)

    def _program(self, operands: Tensors) -> Any:
        operation, plan = self._operation, self._plan

        def forward(tape: Tape) -> Sequence[Tensor | None]:
            results, kept = operation.forward(plan, tape, *tape.inputs)
            return *results, *kept

        def place(index: int | None) -> int:
            return -1 if index is None else index

        streams = operands[0]
        assert streams is not None
        return _module().Program(
            operation.name,
            _taken(operands, forward),
            [operand is not None for operand in operands],
            list(operation.parameters),
            operation.num_results,
            place(operation.filled),
            place(operation.unused),
            place(operation.branch),
            place(operation.bias),
            _Backward(operation, plan.call, streams.shape),
        )


class _Backward:
    """The gradients that a program has no tape of, made by Python, and the tape, if there can be.

    It has the plan's call and not the plan, which has the program, which has this: Python does not
    see that circle.
    """

    def __init__(self, operation: Operation, call: Call, shape: torch.Size) -> None:
        self._operation = operation
        self._call = call
        self._shape = shape
        # Keys of which there is a tape, or can be none.
        self._decided: set[int] = set()

    def __call__(
        self,
        key: int,
        trains: bool,
        main_grad: Tensor | None,
        saved: list[Tensor | None],
        grads: list[Tensor | None],
    ) -> Tensors:
        plan, work = planned(self._call), self._operation.backward
        gradients = work(plan, plan.stream(), saved, grads, trains, main_grad)
        program = plan.programs.program_of(self._shape) if plan.programs is not UNDECIDED else None
        if program is None or key in self._decided:
            return gradients

        def backward(tape: Tape) -> Tensors:
            *given, into = tape.inputs
            return work(plan, tape, given[: len(saved)], given[len(saved) :], trains, into)

        try:
            program.add_backward(key, _taken((*saved, *grads, main_grad), backward))
        except NotYetTaken:
            return gradients
        except NotTaken as reason:
            _say_once(str(reason))
        self._decided.add(key)
        return gradients


def _module() -> ModuleType:
    module, reason = extension()
    assert module is not None, reason
    return module


def _taken(inputs: Tensors, work: Callable[[Tape], Sequence[Tensor | None]]) -> Any:
    """The extension's tape of ``work``.

    Raises:
        NotTaken: there can be none.
    """
    tape = Tape(inputs)
    with torch.no_grad(), tape:
        results = work(tape)
    places = [tape.place_of(result) for result in results]
    steps = [(*step[:5], _with_scratch(step.function, step.arguments)) for step in tape.steps]
    return _module().Tape(len(tape.inputs), tape.allocations, steps, places)


def _with_scratch(function: int, arguments: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """With null for the memory that Triton's kernels take behind their parameters.

    Raises:
        NotTaken: what CUDA says of the kernel's parameters is something else.
    """
    sizes = _module().parameters_of(function)
    missing = len(sizes) - len(arguments)
    if not 0 <= missing <= _MOST_SCRATCH:
        raise NotTaken(f"a kernel has {len(sizes)} parameters for {len(arguments)} arguments")
    return arguments + [(-1, 0)] * missing


@cache
def _say_once(reason: str) -> None:
    _LOGGER.warning("hyper-connections are launched by Python, not by the extension: %s", reason)
