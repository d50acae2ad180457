"""When every action of a schedule ran, simulated or measured, and what follows from it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mhc_megatron.pipeline.actions import Action
from mhc_megatron.pipeline.costs import Number
from mhc_megatron.pipeline.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Span:
    """One action of a rank, from ``start`` to ``end``."""

    action: Action
    start: Number
    end: Number


@dataclass(frozen=True, kw_only=True, eq=False)
class Timeline:
    """All actions of all ranks with their times, in the unit of the costs.

    Attributes:
        schedule: what ran.
        unit: name of the unit of time, or empty.
        first_action: [ranks + 1] where the actions of a rank start in ``start`` and ``end``.
        start: [actions] in the order of the schedule, rank after rank.
        end: [actions].
        peak_live: [ranks] most (stage, micro-batch) pairs that a rank holds activations of.
        peak_bytes: [ranks] most bytes of them.
    """

    schedule: Schedule
    unit: str = ""
    first_action: np.ndarray
    start: np.ndarray
    end: np.ndarray
    peak_live: np.ndarray
    peak_bytes: np.ndarray

    @cached_property
    def makespan(self) -> Number:
        """Time of the step: the end of the last action; it starts at 0."""
        return self.end.max(initial=0).item()

    @cached_property
    def busy(self) -> list[Number]:
        """For every rank, the time in which it computes."""
        spent = self.end - self.start
        spans = zip(self.first_action[:-1], self.first_action[1:], strict=True)
        return [spent[first:stop].sum().item() for first, stop in spans]

    @property
    def bubble(self) -> list[Number]:
        """For every rank, the time in which it waits: the makespan minus ``busy``."""
        return [self.makespan - busy for busy in self.busy]

    @property
    def bubble_fraction(self) -> float:
        """Share of all ranks' time in which they wait; 0 when nothing takes time."""
        if not self.makespan:
            return 0.0
        return sum(self.bubble) / (self.makespan * len(self.busy))

    def spans(self, rank: int) -> Iterator[Span]:
        """The actions of a rank in order."""
        first, stop = self.first_action[rank : rank + 2].tolist()
        times = zip(self.start[first:stop].tolist(), self.end[first:stop].tolist(), strict=True)
        for action, (start, end) in zip(self.schedule.ranks[rank], times, strict=True):
            yield Span(action, start, end)
