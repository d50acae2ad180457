"""The planner of an Overlap: which phase is enqueued when."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from mhc_megatron.pipeline.errors import ScheduleError
from mhc_megatron.pipeline.phases import Lane, Phase, Plan, Step, check_plan, lane_of


@dataclass(frozen=True, slots=True)
class PhaseCost:
    """Times of one phase in any unit.

    Attributes:
        forward: of F.
        dgrad: of B, the gradient of the phase's input.
        wgrad: of W, the gradients of its weights; 0 where it has none worth a step of their own.
        rebuild: of R, if a recompute block begins here.
    """

    forward: float = 1.0
    dgrad: float = 1.0
    wgrad: float = 0.0
    rebuild: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) >= 0:
                raise ScheduleError(f"{name}={getattr(self, name)} must be at least 0")

    def of(self, step: Step) -> float:
        """Of a step of this phase."""
        return {"F": self.forward, "B": self.dgrad, "W": self.wgrad, "R": self.rebuild}[step.op]


# Tensor parallelism's are not measured: beside a dispatch a token crosses once and not to six
# experts, over links within a host, which are several times as fast. An all-reduce counts as two of
# sequence parallelism's, which gathers gradients and the branch's input in a scatter's backward.
_COLLECTIVES: Mapping[str, PhaseCost] = MappingProxyType(
    {
        "gather": PhaseCost(0.2, 0.2),
        "scatter": PhaseCost(0.2, 0.4),
        "copy": PhaseCost(0.0, 0.4),
        "reduce": PhaseCost(0.4, 0.0),
    }
)

# Measured for a MoE layer of the mHC paper's 27B model (benchmarks/overlap.py), with exchanges as
# long as the products of their tokens. They decide the order of a run, the same on all ranks.
ESTIMATED_COSTS: Mapping[str, PhaseCost] = MappingProxyType(
    {
        "enter": PhaseCost(0.2, 0.4),
        "attention": PhaseCost(6.3, 6.0, 0.4),
        "attention_post": PhaseCost(0.3, 0.5, rebuild=0.3),
        "mlp": PhaseCost(2.0, 3.2, 3.4),
        "router": PhaseCost(0.9, 0.9, 0.5),
        "dispatch": PhaseCost(5.2, 5.2),
        "experts": PhaseCost(2.0, 3.2, 3.4),
        "combine": PhaseCost(5.2, 5.2),
        "unpermute": PhaseCost(0.1, 0.1),
        "mlp_post": PhaseCost(0.3, 0.5, rebuild=0.3),
        "leave": PhaseCost(4.0, 4.0, 4.0),
        **{
            f"{branch}_{name}": cost
            for branch in ("attention", "mlp")
            for name, cost in _COLLECTIVES.items()
        },
    }
)


def cost_of(step: Step, phase: Phase, costs: Mapping[str, PhaseCost]) -> float:
    """The time of a step of a phase.

    Raises:
        ScheduleError: a phase without a cost.
    """
    if phase.name not in costs:
        known = ", ".join(sorted(costs)) or "the costs, which have none"
        raise ScheduleError(f"no cost for the phase {phase.name!r}; add one to {known}")
    return costs[phase.name].of(step)


class _Lanes:
    """Steps that are enqueued so far, and when they end if lanes do not slow each other down."""

    def __init__(
        self,
        forward: Sequence[Phase],
        backward: Sequence[Phase],
        costs: Mapping[str, PhaseCost],
    ) -> None:
        self._rows = {"F": forward, "B": backward, "W": backward, "R": backward}
        self._costs = costs
        self._free = dict.fromkeys(Lane, 0.0)
        self._chain = {"F": 0.0, "B": 0.0}
        self._ends: dict[Step, float] = {}

    @property
    def end(self) -> float:
        return max(self._free.values())

    def cost(self, step: Step) -> float:
        return cost_of(step, self._rows[step.op][step.phase], self._costs)

    def start(self, step: Step) -> float:
        """When the step would run, if it were enqueued now."""
        ready = 0.0
        if step.op in self._chain:
            ready = self._chain[step.op]
        if step.op == "W":
            ready = self._ends[Step("B", step.phase)]
        if step.op == "B":
            ready = max(ready, self._ends.get(Step("R", step.phase), 0.0))
        return max(self._free[self._lane(step)], ready)

    def enqueue(self, step: Step) -> None:
        end = self.start(step) + self.cost(step)
        self._free[self._lane(step)] = self._ends[step] = end
        if step.op in self._chain:
            self._chain[step.op] = end

    def _lane(self, step: Step) -> Lane:
        return lane_of(step, self._rows[step.op][step.phase])


# Variations of the costs for which a plan is made, and how far they go.
_VARIATIONS, _LEAST, _MOST = 48, 0.4, 2.5


def interleave(
    forward: Sequence[Phase],
    backward: Sequence[Phase],
    costs: Mapping[str, PhaseCost] = ESTIMATED_COSTS,
    *,
    rebuild: bool = False,
) -> Plan:
    """The plan of a forward and a backward.

    A rule makes it: next is what can start first; of two that start together the shorter, since
    exchanges follow the short phases, then the one with more to do after it. Weight gradients come
    where nothing else can start so early, and at the end. A block is rebuilt while the one before
    it runs backward. The rule does not look ahead, so it also makes plans for costs that are drawn
    around ``costs``, always the same; the plan that ends first with ``costs`` is returned. Lanes do
    not slow each other down here: a plan has to be the same on all ranks, and slowdowns are
    measured on one.

    Args:
        forward, backward: as for ``check_plan``.
        costs: by the phases' names. The same on all ranks that exchange tokens.
        rebuild: plan the rebuilds of recompute blocks; else the backward does them as it goes.

    Raises:
        ScheduleError: a phase without a cost.
    """
    best = _by_rule(forward, backward, costs, rebuild)
    ends = _enqueued(best, forward, backward, costs).end
    draw = random.Random(0)
    names = {phase.name for phase in (*forward, *backward)}
    own = {name: cost for name, cost in costs.items() if name in names}
    for _ in range(_VARIATIONS):
        varied = {name: _varied(cost, draw) for name, cost in own.items()}
        plan = _by_rule(forward, backward, varied, rebuild)
        end = _enqueued(plan, forward, backward, costs).end
        if end < ends:
            best, ends = plan, end
    check_plan(best, forward, backward)
    return best


def _varied(cost: PhaseCost, draw: random.Random) -> PhaseCost:
    return PhaseCost(
        *(getattr(cost, name) * draw.uniform(_LEAST, _MOST) for name in PhaseCost.__slots__)
    )


def _by_rule(
    forward: Sequence[Phase],
    backward: Sequence[Phase],
    costs: Mapping[str, PhaseCost],
    rebuild: bool,
) -> Plan:
    lanes = _Lanes(forward, backward, costs)
    plan: list[Step] = []
    rows = {
        "F": [Step("F", place) for place in range(len(forward))],
        "B": [Step("B", place) for place in reversed(range(len(backward)))],
    }
    entries = [step.phase for step in rows["B"] if backward[step.phase].begins_block]
    rebuilds = [Step("R", place) for place in entries] if rebuild else []
    left = {op: sum(map(lanes.cost, row)) for op, row in rows.items()}
    weights: list[Step] = []

    def enqueue(step: Step) -> None:
        lanes.enqueue(step)
        plan.append(step)

    if rebuilds:
        enqueue(rebuilds.pop(0))
    while rows["F"] or rows["B"]:
        heads = [row[0] for row in rows.values() if row]
        step = min(heads, key=lambda head: (lanes.start(head), lanes.cost(head), -left[head.op]))
        if weights and lanes.start(weights[0]) < lanes.start(step):
            enqueue(weights.pop(0))
            continue
        enqueue(step)
        rows[step.op].pop(0)
        left[step.op] -= lanes.cost(step)
        if step.op == "B":
            if lanes.cost(Step("W", step.phase)) > 0:
                weights.append(Step("W", step.phase))
            if rebuilds and backward[step.phase].begins_block:
                enqueue(rebuilds.pop(0))
    for step in weights:
        enqueue(step)
    return tuple(plan)


def _enqueued(
    plan: Plan,
    forward: Sequence[Phase],
    backward: Sequence[Phase],
    costs: Mapping[str, PhaseCost],
) -> _Lanes:
    lanes = _Lanes(forward, backward, costs)
    for step in plan:
        lanes.enqueue(step)
    return lanes


def serial(forward: Sequence[Phase], backward: Sequence[Phase]) -> Plan:
    """The forward, then the backward: what every plan is compared with."""
    steps = [Step("F", place) for place in range(len(forward))]
    for place in reversed(range(len(backward))):
        if backward[place].begins_block:
            steps.append(Step("R", place))
        steps += [Step("B", place), Step("W", place)]
    return tuple(steps)
