"""When every step of a plan runs: on lanes beside each other, which may slow each other down."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from mhc_megatron.pipeline.errors import ScheduleError
from mhc_megatron.pipeline.interleave import ESTIMATED_COSTS, PhaseCost, cost_of
from mhc_megatron.pipeline.phases import Lane, Phase, Plan, Step, check_plan, lane_of


@dataclass(frozen=True, slots=True)
class Slowdowns:
    """How many times as long a lane takes for its work while another one runs something.

    On a GPU lanes share multiprocessors and memory bandwidth. Factors of several lanes that run at
    once multiply: a lane that is left a part of the GPU by one of them shares that with the next.

    Attributes:
        factors: by lane and the lane beside it, at least 1; 1 where there is none.

    Raises:
        ScheduleError: a factor below 1, or no number; a lane beside itself.
    """

    factors: Mapping[tuple[Lane, Lane], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for (lane, beside), factor in self.factors.items():
            name = f"slowdowns.{lane.value}.{beside.value}"
            if lane is beside:
                raise ScheduleError(f"{name}: a lane runs one step at a time; leave it out")
            if not 1 <= factor < math.inf:
                raise ScheduleError(
                    f"{name}={factor} must be at least 1, the time beside the other lane over the "
                    "time alone; write 1 where it is not slowed down"
                )

    def of(self, lane: Lane, running: Collection[Lane]) -> float:
        """The factor of a lane while ``running`` run beside it."""
        return math.prod(self.factors.get((lane, beside), 1) for beside in running)


NO_SLOWDOWNS = Slowdowns()


@dataclass(frozen=True, slots=True)
class Span:
    """A step on its lane."""

    step: Step
    phase: Phase
    lane: Lane
    start: float
    end: float


@dataclass(slots=True)
class _Running:
    """A step that has begun: at ``since`` it had ``left`` to do, and takes ``factor`` times that.

    Both change only with the factor: at a factor of 1 a step ends exactly its cost after its start.
    """

    step: Step
    start: float
    since: float
    left: float
    factor: float = 1

    def end(self) -> float:
        return self.since + self.left * self.factor

    def slow(self, factor: float, now: float) -> None:
        if factor != self.factor:
            if now > self.since:
                self.left = max(self.left - (now - self.since) / self.factor, 0)
            self.since, self.factor = now, factor


def simulate_lanes(
    plan: Plan,
    forward: Sequence[Phase],
    backward: Sequence[Phase],
    costs: Mapping[str, PhaseCost] = ESTIMATED_COSTS,
    slowdowns: Slowdowns = NO_SLOWDOWNS,
) -> tuple[Span, ...]:
    """When every step of a plan runs.

    A step begins when the one before it on its lane, and what it needs, have ended. Its rate
    follows from the lanes that run something, and changes whenever a step begins or ends.

    Args:
        plan, forward, backward: as for ``check_plan``.
        costs: as for ``interleave``; of a step that runs alone.
        slowdowns: of lanes beside each other.

    Returns:
        Spans in the order of the plan.

    Raises:
        ScheduleError: the plan is not valid, or a phase has no cost.
    """
    check_plan(plan, forward, backward)
    rows = {"F": forward, "B": backward, "W": backward, "R": backward}
    phases = {step: rows[step.op][step.phase] for step in plan}
    lanes = {step: lane_of(step, phases[step]) for step in plan}
    needs = needs_of(plan)
    queues = {lane: [step for step in plan if lanes[step] is lane][::-1] for lane in Lane}
    running: dict[Lane, _Running] = {}
    spans: dict[Step, Span] = {}
    now: float = 0
    while len(spans) < len(plan):
        for lane, queue in queues.items():
            if lane not in running and queue and all(need in spans for need in needs[queue[-1]]):
                step = queue.pop()
                running[lane] = _Running(step, now, now, cost_of(step, phases[step], costs))
        for lane, step_now in running.items():
            step_now.slow(slowdowns.of(lane, running.keys() - {lane}), now)
        now = min(step_now.end() for step_now in running.values())
        for lane, step_now in list(running.items()):
            if step_now.end() <= now:
                step = step_now.step
                spans[step] = Span(step, phases[step], lane, step_now.start, now)
                del running[lane]
    return tuple(spans[step] for step in plan)


def needs_of(plan: Plan) -> dict[Step, list[Step]]:
    """Which steps, of other lanes as well, have to end before each begins.

    Args:
        plan: a valid one.
    """
    last = max((step.phase for step in plan if step.op == "B"), default=0)
    rebuilt = {step.phase for step in plan if step.op == "R"}
    found: dict[Step, list[Step]] = {}
    for step in plan:
        found[step] = []
        if step.op == "F" and step.phase > 0:
            found[step].append(Step("F", step.phase - 1))
        if step.op == "B" and step.phase < last:
            found[step].append(Step("B", step.phase + 1))
        if step.op == "B" and step.phase in rebuilt:
            found[step].append(Step("R", step.phase))
        if step.op == "W":
            found[step].append(Step("B", step.phase))
    return found
