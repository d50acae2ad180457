"""Times of a pair, and of its phases one after the other on one lane."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from overlap_exchange import Wait
from overlap_pair import WARM_UP, GraphedPair, Pair, release
from te_blocks import Stage
from torch import Tensor

from mhc_megatron.megatron.phases import Lanes
from mhc_megatron.pipeline.interleave import PhaseCost, serial
from mhc_megatron.pipeline.phases import Lane, OverlapMode, Phase, Plan, Step
from mhc_megatron.pipeline.turns import Thread, Turns

LEAST_WEIGHTS = 0.01  # ms; weight gradients that take less are no step of a plan

Clock = Callable[[], Any]


class OneLane(Lanes):
    """All lanes are the compute lane, so that a phase's time is its own."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._streams = dict.fromkeys(self._streams, self.compute)
        self._between = self.compute  # or what a step of the backward begins with is not timed


class TimedTurns(Turns):
    """Turns that note when each step begins."""

    def __init__(self, plan: Plan, log: list[tuple[Step, Any]], clock: Clock) -> None:
        super().__init__(plan)
        self._log, self._clock = log, clock

    def next(self, thread: Thread) -> Step:
        """As in ``Turns``."""
        step = super().next(thread)
        self._log.append((step, self._clock()))
        return step


def clock_of(
    device: torch.device, *, in_graph: bool = False
) -> tuple[Clock, Callable[[Any, Any], float]]:
    """What marks a moment on the current stream, and the milliseconds between two of them.

    ``in_graph``: the moment is one of every replay of the graph that is being captured.
    """
    if device.type != "cuda":
        return time.perf_counter, lambda start, end: 1e3 * (end - start)

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True, external=in_graph)
        event.record()
        return event

    def between(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end)

    return mark, between


def time_of(stage: Stage, pair: Pair | GraphedPair, device: torch.device) -> float:
    """Milliseconds of one step of a pair."""
    clock, between = clock_of(device)
    stage.forget()
    pair.first_forward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    pair.step()
    end = clock()
    pair.last_backward()
    return between(start, end)


@dataclass(frozen=True)
class MeasuredCosts:
    """Phases' times, one after the other on one lane.

    Attributes:
        costs: by name, in milliseconds. Exchanges' are those of a pair; the others' are taken where
            exchanges take no time, since in an overlapped pair the GPU has no pauses either.
        without_pauses: all others together, over the same beside exchanges that take their time:
            more than 1 where the GPU lowers its clock under load.
    """

    costs: dict[str, PhaseCost]
    without_pauses: float


def phase_costs(
    stage: Stage, mode: OverlapMode, wait: Wait, device: torch.device, repetitions: int, launch: str
) -> MeasuredCosts:
    """Times of a stage's phases under one mode, ``wait`` being that of its exchanges."""
    paused, phases = _times(stage, mode, device, repetitions, launch)
    release()
    with wait.left_out():
        times, _ = _times(stage, mode, device, repetitions, launch)
    release()
    exchanges = {phase.name for phase in phases if phase.lane is Lane.COMMUNICATION}
    others = [key for key in times if key[0] not in exchanges]
    ratio = sum(sum(times[key]) for key in others) / sum(sum(paused[key]) for key in others)
    times |= {key: found for key, found in paused.items() if key[0] in exchanges}

    def of(name: str, op: str) -> float:
        return statistics.mean(times[name, op]) if (name, op) in times else 0.0

    costs = {
        name: PhaseCost(
            forward=of(name, "F"),
            dgrad=of(name, "B"),
            wgrad=weights if (weights := of(name, "W")) > LEAST_WEIGHTS else 0.0,
            rebuild=of(name, "R"),
        )
        for name in sorted({name for name, _ in times})
    }
    return MeasuredCosts(costs, ratio)


def _times(
    stage: Stage, mode: OverlapMode, device: torch.device, repetitions: int, launch: str
) -> tuple[dict[tuple[str, str], list[float]], tuple[Phase, ...]]:
    """Milliseconds by the phases' names and the steps' operations, and the phases."""
    in_graph = launch == "graph"
    clock, between = clock_of(device, in_graph=in_graph)
    times: dict[tuple[str, str], list[float]] = {}

    def planner(forward: Sequence[Phase], backward: Sequence[Phase], *, rebuild: bool) -> Plan:
        return tuple(s for s in serial(forward, backward) if rebuild or s.op != "R")

    log: list[tuple[Step, Any]] = []
    ends: list[Any] = []

    class Watched(Pair):
        def step(self) -> tuple[Tensor, Tensor]:
            log.clear()
            results = super().step()
            ends.append(clock())
            return results

    watched = functools.partial(TimedTurns, log=log, clock=clock)
    pair: Pair | GraphedPair = Watched(stage, mode, OneLane(device), planner, watched)
    if in_graph:
        pair = GraphedPair(stage, pair)
    for repetition in range(repetitions + WARM_UP):
        stage.forget()
        pair.first_forward()
        pair.step()
        pair.last_backward()
        if repetition < WARM_UP:
            continue
        if in_graph:
            torch.cuda.synchronize()
        moments = [moment for _, moment in log] + [ends[-1]]
        for (step, start), after in zip(log, moments[1:], strict=True):
            key = pair.phases[step.phase].name, step.op
            times.setdefault(key, []).append(between(start, after))
    return times, pair.phases
