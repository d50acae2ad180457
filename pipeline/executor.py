"""Run one rank's program: computes, and the messages between them."""

import contextlib
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.profiler import record_function

from mhc_megatron.pipeline.actions import Action, Compute, Op, Overlap, Transfer, parts
from mhc_megatron.pipeline.dataflow import message_of
from mhc_megatron.pipeline.lower import Program
from mhc_megatron.pipeline.stage import Stage
from mhc_megatron.pipeline.stopwatch import Stopwatch
from mhc_megatron.pipeline.transport import Message, Receipt, Transport

_UNNAMED = contextlib.nullcontext()
_BEFORE, _AFTER = 8, 4  # items of the program around a failed one, in the message

# (stage, micro-batch, input) of a forward and (stage, micro-batch, gradient) of a backward.
Side = tuple[Stage, int, Tensor | None]
# Called with an output, or a gradient, as soon as it is enqueued, on the stream that makes it.
OutputMade = Callable[[Tensor], None]
GradientMade = Callable[[Tensor | None], None]
OverlapFunction = Callable[[Side, Side, OutputMade, GradientMade], None]
Progress = Callable[[Action | Transfer | None], None]


class ExecutionError(RuntimeError):
    """An item of a program failed; the error itself is ``__cause__``.

    Attributes:
        rank: of the pipeline.
        item: what failed; None for what comes after the program.
    """

    def __init__(self, rank: int, program: Program, position: int, cause: BaseException) -> None:
        self.rank = rank
        self.item = program[position] if position < len(program) else None
        what = "after its last action" if self.item is None else f"at {self.item}"
        super().__init__(
            f"pipeline rank {rank} failed {what}: {type(cause).__name__}: {cause}\n"
            f"  {_excerpt(program, position)}"
        )


def execute(
    program: Program,
    stages: Mapping[int, Stage],
    transport: Transport,
    *,
    num_stages: int,
    message: Message,
    overlap: OverlapFunction | None = None,
    first: bool = False,
    stopwatch: Stopwatch | None = None,
    progress: Progress | None = None,
) -> dict[int, Tensor]:
    """Run a rank's part of one step.

    Args:
        program: from ``lower_rank``.
        stages: the stages of this rank.
        transport: to the neighbours.
        num_stages: of the whole model.
        message: what the stages send each other.
        overlap: runs the two sides of an Overlap, one at a time; None for the forward, then the
            backward. Messages leave when they are made: the forward's not after the backward, the
            gradient not after the weight gradients, but after the forward's.
        first: the stages run for the first time in this process. Their kernels are loaded then,
            which may wait for all messages under way: those of an Overlap leave after it.
        stopwatch: measures every action.
        progress: called before every item, and with None once only the last sends are under way.

    Returns:
        The last stage's outputs by micro-batch, if this rank has that stage.

    Raises:
        ExecutionError: an action or a message failed.
    """
    run = _Run(program, stages, transport, num_stages, message, overlap, first)
    position = 0
    # To open a range takes longer than an item of an empty stage, also where nobody records it.
    profiled = torch.autograd._profiler_enabled()
    try:
        for item in program:
            if progress is not None:
                progress(item)
            with record_function(str(item)) if profiled else _UNNAMED:
                if stopwatch is None or isinstance(item, Transfer):
                    run.item(item)
                else:
                    stopwatch.start()
                    run.item(item)
                    stopwatch.stop()
            position += 1
        if progress is not None:
            progress(None)
        transport.finish()
    except Exception as error:
        raise ExecutionError(transport.rank, program, position, error) from error
    run.check_nothing_left()
    return run.outputs


class _Run:
    def __init__(
        self,
        program: Program,
        stages: Mapping[int, Stage],
        transport: Transport,
        num_stages: int,
        message: Message,
        overlap: OverlapFunction | None,
        first: bool,
    ) -> None:
        self.outputs: dict[int, Tensor] = {}
        self._stages, self._transport, self._num_stages = stages, transport, num_stages
        self._message, self._overlap, self._first = message, overlap, first
        self._announced = (message.shape, message.dtype)
        self._messages: dict[Compute, Tensor] = {}  # made or received, and not yet used
        self._sends = {
            item.of: item for item in program if isinstance(item, Transfer) and item.kind == "send"
        }
        self._posted: dict[int, deque[Receipt]] = defaultdict(deque)

    def item(self, item: Action | Transfer) -> None:
        match item:
            case Compute(op=Op.F):
                x = self._input(item)
                self._store(item, self._stages[item.stage].forward(item.mb, x))
            case Compute(op=Op.B | Op.I):
                defer = item.op is Op.I
                grad = self._input(item)
                stage = self._stages[item.stage]
                self._store(item, stage.backward(item.mb, grad, defer_weights=defer))
            case Compute(op=Op.W):
                self._stages[item.stage].weights(item.mb)
            case Compute(op=Op.R):
                self._stages[item.stage].recompute(item.mb)
            case Overlap():
                self._both(item)
            case Transfer("send", of):
                if of in self._messages:  # else it has left during its Overlap
                    self._transport.send(item, self._messages.pop(of))
            case Transfer("post", _, peer):
                self._posted[peer].append(self._transport.receive(item, self._message))
            case Transfer("recv", of, peer):
                self._messages[of] = self._posted[peer].popleft().wait()

    def _both(self, pair: Overlap) -> None:
        if self._overlap is None:
            self.item(pair.fwd)
            self.item(pair.bwd)
            return
        forward, backward = (
            (self._stages[compute.stage], compute.mb, self._input(compute))
            for compute in parts(pair)
        )

        sends = {of: self._sends[of] for of in parts(pair) if of in self._sends}

        def leave(of: Compute) -> None:
            if of in sends and of in self._messages and not self._first:
                self._transport.send(sends[of], self._messages.pop(of))
                del sends[of]

        def output_made(output: Tensor) -> None:
            self._store(pair.fwd, output)
            leave(pair.fwd)
            leave(pair.bwd)  # if it has waited

        def gradient_made(gradient: Tensor | None) -> None:
            self._store(pair.bwd, gradient)
            if pair.fwd not in sends:
                leave(pair.bwd)

        self._overlap(forward, backward, output_made, gradient_made)

    def check_nothing_left(self) -> None:
        assert not self._messages, f"messages that nobody used: {[*map(str, self._messages)]}"
        assert not any(self._posted.values())
        for number, stage in self._stages.items():
            assert not stage.unfinished, f"stage {number}: unfinished {stage.unfinished}"

    def _input(self, compute: Compute) -> Tensor | None:
        """The activation or gradient that ``compute`` needs; None at the ends of the model."""
        if compute.op is Op.F:
            before = compute.stage - 1
            makers = [Compute(Op.F, before, compute.mb)]
        else:
            before = compute.stage + 1
            makers = [Compute(op, before, compute.mb) for op in (Op.B, Op.I)]
        if not 0 <= before < self._num_stages:
            return None
        made = makers[0] if makers[0] in self._messages else makers[-1]
        return self._messages.pop(made)

    def _store(self, compute: Compute, result: Tensor | None) -> None:
        if message_of(compute, self._num_stages) is not None:
            assert result is not None, f"{compute} made no message"
            found, wanted = (tuple(result.shape), result.dtype), self._announced
            # Another size would fill the receiver's memory with something else, without an error.
            if found != wanted:
                raise ValueError(f"a message of {found} instead of {wanted}")
            self._messages[compute] = result
        elif compute.op is Op.F:
            assert result is not None
            self.outputs[compute.mb] = result


def _excerpt(program: Program, position: int) -> str:
    """The program around ``position``, which is marked; without other posts."""
    shown = [
        index
        for index, item in enumerate(program)
        if index == position or not (isinstance(item, Transfer) and item.kind == "post")
    ]
    at = bisect_left(shown, position)
    first, stop = max(0, at - _BEFORE), min(len(shown), at + 1 + _AFTER)
    items = [
        f">>> {program[index]} <<<" if index == position else str(program[index])
        for index in shown[first:stop]
    ]
    before = f"({first} before) " if first else ""
    after = f" ({len(shown) - stop} after)" if stop < len(shown) else ""
    return f"{before}{', '.join(items)}{after}"
