"""The phases of a stage, and the order in which an Overlap interleaves those of two micro-batches.

A stage's forward is a row of phases, such as a layer's attention, its experts, or the exchange of
tokens before them; the backward is the same row from its end. Each phase runs on a lane. What a
host enqueues on one lane runs in that order, lanes run beside each other, so a plan is no more than
the order in which the phases are enqueued.
(mHC, arXiv 2512.24880, section 4.3.3 and figure 4; DualPipe, arXiv 2412.19437, figure 4.)
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from mhc_megatron.pipeline.errors import ScheduleError

OverlapMode = Literal["none", "post", "recompute", "all"]
"""What an Overlap does: ``none`` runs the forward, then the backward; the others interleave their
phases, with F_post,res (``post``), the rebuilds (``recompute``) or both (``all``) on PRIORITY."""

Collectives = Literal["all_reduce", "sequence"]
"""Tensor parallelism's around a branch's linear layers: of whole sums, or of sequences' parts."""


class Lane(str, Enum):
    """Where a phase runs; on a GPU each is a stream of its own."""

    COMPUTE = "compute"
    COMMUNICATION = "communication"
    PRIORITY = "priority"


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a stage's forward and of its backward; as text ``3.experts``.

    Attributes:
        name: what it does.
        lane: of forward and backward; weight gradients run on COMPUTE.
        layer: in the stage, from 0; None for what stands before or after the layers.
        begins_block: its backward is the first of a recompute block, which has to be rebuilt then.
    """

    name: str
    lane: Lane = Lane.COMPUTE
    layer: int | None = None
    begins_block: bool = False

    def __str__(self) -> str:
        return self.name if self.layer is None else f"{self.layer}.{self.name}"


MOE_PHASES = ("router", "dispatch", "experts", "combine", "unpermute")
_EXCHANGES = ("dispatch", "combine")
# Named after Megatron's functions. A copy is an all-reduce of gradients in the backward.
_AROUND = {"all_reduce": ("copy", "reduce"), "sequence": ("gather", "scatter")}


def collective_phases(branch: str, collectives: Collectives) -> tuple[str, str]:
    """The names of the phases before and after ``attention`` or ``mlp``."""
    before, after = _AROUND[collectives]
    return f"{branch}_{before}", f"{branch}_{after}"


def stage_phases(
    is_moe: Sequence[bool],
    mode: OverlapMode,
    *,
    block_ends: Set[int] = frozenset(),
    loss: bool,
    collectives: Collectives | None = None,
) -> tuple[Phase, ...]:
    """The phases of a stage's forward, in order.

    Args:
        is_moe: of each of its layers, whether its MLP is one of experts.
        mode: with ``post`` and ``all``, what follows an MLP or the exchange after its experts,
            ``unpermute`` and F_post,res, is on the priority lane, so that it does not wait for what
            the other micro-batch computes; the attention's stays on the compute lane, as in the
            paper.
        block_ends: the last sublayer of each recompute block, from 0 in the stage.
        loss: the stage has the final norm and the loss.
        collectives: those before and after every attention and every dense MLP are phases; None
            where there are none, or where they are inside.
    """
    posts = Lane.PRIORITY if mode in ("post", "all") else Lane.COMPUTE
    phases = [Phase("enter")]
    for layer, moe in enumerate(is_moe):
        phases += [
            *_branch("attention", layer, collectives),
            Phase("attention_post", layer=layer, begins_block=2 * layer in block_ends),
            *(_experts(layer, posts) if moe else _branch("mlp", layer, collectives)),
            Phase("mlp_post", posts, layer, begins_block=2 * layer + 1 in block_ends),
        ]
    if loss:
        phases.append(Phase("leave"))
    return tuple(phases)


def _branch(name: str, layer: int, collectives: Collectives | None) -> list[Phase]:
    phases = [Phase(name, layer=layer)]
    if collectives is None:
        return phases
    before, after = (
        Phase(around, Lane.COMMUNICATION, layer) for around in collective_phases(name, collectives)
    )
    return [before, *phases, after]


def _experts(layer: int, posts: Lane) -> list[Phase]:
    lanes = {"unpermute": posts, **dict.fromkeys(_EXCHANGES, Lane.COMMUNICATION)}
    return [Phase(name, lanes.get(name, Lane.COMPUTE), layer) for name in MOE_PHASES]


@dataclass(frozen=True, slots=True)
class Step:
    """One entry of a plan.

    Attributes:
        op: F, the forward of a phase; B, its backward, but for weights; W, all weight gradients
            that backwards so far have left; R, the rebuild of the block that the phase's backward
            enters.
        phase: its place in the stage's row.
    """

    op: Literal["F", "B", "W", "R"]
    phase: int


def lane_of(step: Step, phase: Phase) -> Lane:
    """Where a step of a phase runs."""
    return {"R": Lane.PRIORITY, "W": Lane.COMPUTE}.get(step.op, phase.lane)


Plan = tuple[Step, ...]


def check_plan(plan: Plan, forward: Sequence[Phase], backward: Sequence[Phase]) -> None:
    """Raise a ScheduleError unless ``plan`` runs both rows, each step after what it needs.

    Args:
        plan: in the order in which it is enqueued.
        forward: the phases of the stage whose forward runs.
        backward: those of the stage whose backward runs, in the order of its forward.
    """
    rows = {
        "F": list(range(len(forward))),
        "B": list(reversed(range(len(backward)))),
    }
    for op, wanted in rows.items():
        found = [step.phase for step in plan if step.op == op]
        if found != wanted:
            raise ScheduleError(f"the plan runs {op} of phases {found} instead of {wanted}")
    done: set[Step] = set()
    for step in plan:
        if step in done:
            raise ScheduleError(f"the plan has {step} twice")
        if step.op == "W" and Step("B", step.phase) not in done:
            raise ScheduleError(f"the plan has {step} before the backward of that phase")
        if step.op == "R":
            if not 0 <= step.phase < len(backward) or not backward[step.phase].begins_block:
                raise ScheduleError(f"the plan has {step}, but no block begins there")
            if Step("B", step.phase) in done:
                raise ScheduleError(f"the plan has {step} after the backward of that phase")
        done.add(step)
