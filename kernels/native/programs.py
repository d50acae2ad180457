"""Programs of replay.cpp, made of tapes: one for each plan and shape of the streams."""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mhc_megatron.kernels.native.extension import extension
from mhc_megatron.kernels.triton.passes import Operation, Tensors
from mhc_megatron.kernels.triton.plan import Plan
from mhc_megatron.kernels.triton.tape import NotTaken, Tape

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
        program = self._program(operands)
        if program is not None:
            self._programs[streams.shape] = program

    def _program(self, operands: Tensors) -> Any:
        operation, plan = self._operation, self._plan

        def forward(tape: Tape) -> Sequence[Tensor | None]:
            results, kept = operation.forward(plan, tape, *tape.inputs)
            return *results, *kept

        tape = _taken(operands, forward)
        if tape is None:
            return None
        module = extension()[0]
        assert module is not None

        def fallback(
            key: int,
            trains: bool,
            main_grad: Tensor | None,
            saved: list[Tensor | None],
            grads: list[Tensor | None],
        ) -> Tensors:
            gradients = operation.backward(plan, plan.stream(), saved, grads, trains, main_grad)

            def backward(tape: Tape) -> Tensors:
                *given, main_grad = tape.inputs
                split = given[: len(saved)], given[len(saved) :]
                return operation.backward(plan, tape, *split, trains, main_grad)

            taken = _taken((*saved, *grads, main_grad), backward)
            if taken is not None:
                program.add_backward(key, taken)
            return gradients

        def place(index: int | None) -> int:
            return -1 if index is None else index

        program = module.Program(
            operation.name,
            tape,
            [operand is not None for operand in operands],
            list(operation.parameters),
            operation.num_results,
            place(operation.filled),
            place(operation.unused),
            place(operation.branch),
            place(operation.bias),
            fallback,
        )
        return program


def _taken(inputs: Tensors, work: Callable[[Tape], Sequence[Tensor | None]]) -> Any:
    """The extension's tape of ``work``; None, and said once, where there can be none yet."""
    module = extension()[0]
    assert module is not None
    tape = Tape(inputs)
    try:
        with torch.no_grad(), tape:
            results = work(tape)
        places = [tape.place_of(result) for result in results]
        steps = [(*step[:5], _with_scratch(step.function, step.arguments)) for step in tape.steps]
    except NotTaken as reason:
        _say_once(str(reason))
        return None
    return module.Tape(len(tape.inputs), tape.allocations, steps, places)


def _with_scratch(function: int, arguments: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """With null for the memory that Triton's kernels take behind their parameters.

    Raises:
        NotTaken: what CUDA says of the kernel's parameters is something else.
    """
    module = extension()[0]
    assert module is not None
    sizes = module.parameters_of(function)
    missing = len(sizes) - len(arguments)
    if not 0 <= missing <= _MOST_SCRATCH:
        raise NotTaken(f"a kernel has {len(sizes)} parameters for {len(arguments)} arguments")
    return arguments + [(-1, 0)] * missing


@cache
def _say_once(reason: str) -> None:
    _LOGGER.debug("a pass is not replayed: %s", reason)
