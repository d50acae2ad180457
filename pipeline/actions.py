"""The vocabulary of pipeline schedules."""

from dataclasses import dataclass
from enum import Enum
from typing import Literal


class Op(str, Enum):
    """What is computed for one micro-batch in one stage. The letters are PyTorch's; R is ours.

    F: forward. B: the whole backward, I and W together. I: gradient of the stage's input (dgrad).
    W: gradients of the stage's weights (wgrad), after I. R: rebuild of what the hyper-connections
    dropped after the forward, before B or I. Without an R in the schedule, B and I rebuild
    themselves; with one, the rebuild can run while the gradient is still on its way.
    """

    F = "F"
    B = "B"
    I = "I"  # noqa: E741
    W = "W"
    R = "R"


@dataclass(frozen=True, slots=True)
class Compute:
    """One operation; as text ``2F0``: stage 2, forward, micro-batch 0."""

    op: Op
    stage: int
    mb: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op.value}{self.mb}"


@dataclass(frozen=True, slots=True)
class Overlap:
    """A forward and a whole backward as one unit; as text ``(0F7;7B3)``.

    It starts when both have their inputs, and both results are there when it ends. An executor may
    interleave the two, or run the forward and then the backward.
    """

    fwd: Compute
    bwd: Compute

    def __post_init__(self) -> None:
        assert self.fwd.op is Op.F and self.bwd.op is Op.B, f"{self.fwd} and {self.bwd}"

    def __str__(self) -> str:
        return f"({self.fwd};{self.bwd})"


Action = Compute | Overlap


@dataclass(frozen=True, slots=True)
class Transfer:
    """One end of a message: the activation (``of`` is F) or gradient (B, I) that ``of`` made.

    ``peer`` is the rank at the other end. A receive is posted, so that the message can come, and
    later waited for. As text ``send 2F0 to 3``, ``post 2F0 from 2`` or ``recv 2F0 from 2``.
    """

    kind: Literal["send", "post", "recv"]
    of: Compute
    peer: int

    def __str__(self) -> str:
        return f"{self.kind} {self.of} {'to' if self.kind == 'send' else 'from'} {self.peer}"


def parts(action: Action) -> tuple[Compute, ...]:
    """The computes of an action, in the order in which they run."""
    return (action.fwd, action.bwd) if isinstance(action, Overlap) else (action,)
