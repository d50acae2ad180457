"""Arithmetic on curves: the values of a run over its steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values over steps; both lists are equally long."""

    steps: list[int]
    values: list[float]

    def __len__(self) -> int:
        return len(self.steps)


def peak(values: Sequence[float]) -> float:
    """The maximum; NaN if any value is NaN, where ``max`` would depend on the order."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def tail_mean(curve: Curve, *, share: float) -> float:
    """Mean of the last ``share`` of the values, of at least one."""
    count = max(1, math.ceil(share * len(curve)))
    return math.fsum(curve.values[-count:]) / count


def smoothing_window(length: int, *, share: float) -> int:
    """An odd number of points, about ``share`` of ``length``; 1 means no smoothing."""
    return 2 * int(share * length / 2) + 1


def moving_average(curve: Curve, *, window: int) -> Curve:
    """Centred mean over ``window`` points, fewer at both ends, leaving out what is not finite."""
    values = np.asarray(curve.values, dtype=np.float64)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    # Narrower on both sides at once near the ends: a lopsided mean would bend a sloping curve.
    here = np.arange(len(values))
    half = np.minimum(np.minimum(here, here[::-1]), window // 2)
    first, last = here - half, here + half + 1
    number = counts[last] - counts[first]
    mean = (sums[last] - sums[first]) / np.where(number, number, 1)
    return Curve(steps=curve.steps, values=np.where(number, mean, np.nan).tolist())


def difference(curve: Curve, baseline: Curve) -> Curve:
    """``curve - baseline`` at the steps that both have."""
    base = dict(zip(baseline.steps, baseline.values, strict=True))
    pairs = [
        (step, value - base[step])
        for step, value in zip(curve.steps, curve.values, strict=True)
        if step in base
    ]
    return Curve(steps=[step for step, _ in pairs], values=[value for _, value in pairs])
