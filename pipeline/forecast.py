"""What an Overlap of two stages comes to: its length, and what of each lane is exposed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mhc_megatron.pipeline.costs import StageCosts
from mhc_megatron.pipeline.interleave import (
    ESTIMATED_COSTS,
    PhaseCost,
    interleave,
    serial,
)
from mhc_megatron.pipeline.intervals import intersection, length, union
from mhc_megatron.pipeline.json_text import at, check_number, fields, parse
from mhc_megatron.pipeline.lanes import NO_SLOWDOWNS, Slowdowns, Span, simulate_lanes
from mhc_megatron.pipeline.phases import Lane, Phase

_FIELDS = tuple(PhaseCost.__slots__)
_SLOWDOWNS = "slowdowns"


@dataclass(frozen=True, slots=True)
class LaneForecast:
    """One lane during an Overlap.

    Attributes:
        busy: time in which it runs something.
        exposed: of ``busy``, the time in which COMPUTE runs nothing; of COMPUTE itself all of it.
    """

    lane: Lane
    busy: float
    exposed: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """An Overlap of the forward and the backward of stages that are alike.

    Attributes:
        spans: every step on its lane.
        length: of the Overlap.
        slowdowns: of lanes beside each other, in all times but the phases'.
        unslowed_length: of the Overlap, if lanes did not slow each other down.
        serial_length: of the forward, then the backward, on the same lanes.
        forward, dgrad, wgrad, rebuild: sums of the phases.
        lanes: in the order of ``Lane``.
    """

    spans: tuple[Span, ...]
    length: float
    slowdowns: Slowdowns
    unslowed_length: float
    serial_length: float
    forward: float
    dgrad: float
    wgrad: float
    rebuild: float
    lanes: tuple[LaneForecast, ...]

    def stage_costs(self) -> StageCosts:
        """For ``simulate``, which adds the rebuild to every backward without an R."""
        return StageCosts(
            forward=self.forward,
            dgrad=self.dgrad,
            wgrad=self.wgrad,
            recompute=self.rebuild,
            overlap=max(self.length - self.rebuild, 0.0),
        )


def forecast(
    phases: Sequence[Phase],
    costs: Mapping[str, PhaseCost] = ESTIMATED_COSTS,
    *,
    slowdowns: Slowdowns = NO_SLOWDOWNS,
    rebuild: bool = False,
) -> Forecast:
    """An Overlap of two stages with these phases.

    Args:
        phases: of both, from ``stage_phases``.
        costs: of the phases, each alone on the GPU.
        slowdowns: of lanes beside each other. The plan does not know them.
        rebuild: the plan runs rebuilds ahead, on the priority lane.

    Raises:
        ScheduleError: a phase without a cost.
    """
    plan = interleave(phases, phases, costs, rebuild=rebuild)
    unslowed = spans = simulate_lanes(plan, phases, phases, costs)
    if slowdowns != NO_SLOWDOWNS:
        spans = simulate_lanes(plan, phases, phases, costs, slowdowns)
    one_by_one = simulate_lanes(serial(phases, phases), phases, phases, costs, slowdowns)
    found = [costs[phase.name] for phase in phases]
    blocks = [costs[phase.name].rebuild for phase in phases if phase.begins_block]
    return Forecast(
        spans=spans,
        length=_length(spans),
        slowdowns=slowdowns,
        unslowed_length=_length(unslowed),
        serial_length=_length(one_by_one),
        forward=sum(cost.forward for cost in found),
        dgrad=sum(cost.dgrad for cost in found),
        wgrad=sum(cost.wgrad for cost in found),
        rebuild=sum(blocks) if rebuild else 0.0,
        lanes=tuple(_lane(spans, lane) for lane in Lane),
    )


def _length(spans: Sequence[Span]) -> float:
    return max((span.end for span in spans), default=0.0)


def _lane(spans: Sequence[Span], lane: Lane) -> LaneForecast:
    own = _busy(spans, lane)
    hidden = intersection(own, _busy(spans, Lane.COMPUTE)) if lane is not Lane.COMPUTE else []
    return LaneForecast(lane, length(own), length(own) - length(hidden))


def _busy(spans: Sequence[Span], lane: Lane) -> list[tuple[float, float]]:
    return union((span.start, span.end) for span in spans if span.lane is lane)


def phase_costs_from_json(text: str) -> tuple[dict[str, PhaseCost], Slowdowns]:
    """Read costs of phases, and how lanes slow each other down, from a text such as::

        {"attention": {"forward": 2.1, "dgrad": 3.0, "wgrad": 1.2}, ...,
         "slowdowns": {"compute": {"communication": 1.04, "priority": 1.3}, ...}}

    What is left out of a phase is 0; phases that are left out have no cost, and lanes that are left
    out do not slow each other down.

    Raises:
        ScheduleError: no JSON, no such phase, lane or field, one twice, not a number from 0 on, or
            a slowdown below 1.
    """
    given = fields(parse(text), (*ESTIMATED_COSTS, _SLOWDOWNS))
    slowdowns = _slowdowns(given.pop(_SLOWDOWNS, {}))
    costs = {}
    for name, value in given.items():
        numbers = fields(value, _FIELDS, name)
        for field, number in numbers.items():
            check_number(at(name, field), number)
        costs[name] = PhaseCost(**{**dict.fromkeys(_FIELDS, 0.0), **numbers})
    return costs, slowdowns


def _slowdowns(value: Any) -> Slowdowns:
    factors: dict[tuple[Lane, Lane], float] = {}
    names = [lane.value for lane in Lane]
    for name, row in fields(value, names, _SLOWDOWNS).items():
        where = at(_SLOWDOWNS, name)
        others = [other for other in names if other != name]
        for other, factor in fields(row, others, where).items():
            check_number(at(where, other), factor)
            factors[Lane(name), Lane(other)] = factor
    return Slowdowns(factors)
