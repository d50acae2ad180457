"""When the steps of an interleaved pair end, each on its lane, beside the planner's prediction."""

import contextlib
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from overlap_costs import Clock, clock_of
from overlap_pair import WARM_UP, GraphedPair, Pair
from te_blocks import Stage
from torch import Tensor

from mhc_megatron.megatron.phases import Lanes
from mhc_megatron.pipeline.interleave import PhaseCost, cost_of
from mhc_megatron.pipeline.lanes import Span, needs_of
from mhc_megatron.pipeline.phases import Lane, OverlapMode, Phase, Plan, Step, lane_of
from mhc_megatron.pipeline.turns import Thread, Turns

_REPETITIONS = 3


class EndingTurns(Turns):
    """Turns that mark where each step ends, on the stream of its lane."""

    def __init__(
        self, plan: Plan, lanes: Lanes, phases: list[Phase], ends: dict[Step, Any], clock: Clock
    ) -> None:
        super().__init__(plan)
        ends.clear()
        self._lanes, self._phases, self._ends, self._clock = lanes, phases, ends, clock
        self._held: dict[Thread, Step] = {}

    def next(self, thread: Thread) -> Step:
        """As in ``Turns``."""
        self._mark(thread)
        step = super().next(thread)
        self._held[thread] = step
        return step

    def end(self, thread: Thread) -> None:
        """As in ``Turns``."""
        self._mark(thread)
        super().end(thread)

    def _mark(self, thread: Thread) -> None:
        step = self._held.pop(thread, None)
        if step is None:
            return
        stream = self._lanes.stream(lane_of(step, self._phases[step.phase]))
        on_lane = contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
        with on_lane:
            self._ends[step] = self._clock()


def step_ends(
    stage: Stage,
    mode: OverlapMode,
    lanes: Lanes,
    planner: Callable[..., Plan],
    device: torch.device,
    repetitions: int,
    launch: str,
) -> dict[Step, float]:
    """Milliseconds from a pair's start to the end of every step, in the order of the plan.

    Weight gradients that come after the last backward run together, in the last of their steps.
    """
    clock, between = clock_of(device, in_graph=launch == "graph")
    phases: list[Phase] = []
    marks: dict[Step, Any] = {}
    starts: list[Any] = []
    plans: list[Plan] = []

    class Watched(Pair):
        def step(self) -> tuple[Tensor, Tensor]:
            starts.append(clock())
            return super().step()

    def turns(plan: Plan) -> EndingTurns:
        plans.append(plan)
        return EndingTurns(plan, lanes, phases, marks, clock)

    pair: Pair | GraphedPair = Watched(stage, mode, lanes, planner, turns)
    phases += pair.phases
    if launch == "graph":
        pair = GraphedPair(stage, pair)
    times: dict[Step, list[float]] = {}
    for repetition in range(min(repetitions, _REPETITIONS) + WARM_UP):
        stage.forget()
        pair.first_forward()
        pair.step()
        pair.last_backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if repetition >= WARM_UP:
            for step in plans[-1]:
                times.setdefault(step, []).append(between(starts[-1], marks[step]))
    return {step: statistics.median(found) for step, found in times.items()}


def compared(
    ends: Mapping[Step, float], spans: tuple[Span, ...], costs: Mapping[str, PhaseCost]
) -> dict[str, Any]:
    """Keys of a line.

    ``steps`` has, for every step in the plan's order, its name, when it ended, and when it was
    predicted to. ``stretched`` is by lane the time of its steps over their costs. A step's time is
    that from the end of the last step it waits for by the plan: what it waits for besides, or runs
    slower, is in it.
    """
    plan = tuple(span.step for span in spans)
    needs = needs_of(plan)
    last = dict.fromkeys(Lane, 0.0)
    took, cost = dict.fromkeys(Lane, 0.0), dict.fromkeys(Lane, 0.0)
    for span in spans:
        begin = max([last[span.lane], *(ends[need] for need in needs[span.step])])
        took[span.lane] += ends[span.step] - begin
        cost[span.lane] += cost_of(span.step, span.phase, costs)
        last[span.lane] = ends[span.step]
    return {
        "stretched": {lane.value: round(took[lane] / cost[lane], 4) for lane in Lane if cost[lane]},
        "steps": [
            [f"{span.step.op} {span.phase}", round(ends[span.step], 3), round(span.end, 3)]
            for span in spans
        ],
    }
