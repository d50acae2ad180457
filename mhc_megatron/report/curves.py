"""Arithmetic on curves: the values of a run over its steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


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
    """Mean over ``window`` points, an odd number, at the step in their middle.

    The first and last ``window // 2`` steps have no mean: one over fewer points would be noisier
    than the rest, one over a side only would be off where the curve slopes. Values that are not
    finite are left out.
    """
    if len(curve) < window:
        return Curve(steps=[], values=[])
    values = np.asarray(curve.values, dtype=np.float64)
    finite = np.isfinite(values)
    # Window by window: in differences of one running sum a spike would drown all that follows it.
    number = sliding_window_view(finite, window).sum(-1)
    sums = sliding_window_view(np.where(finite, values, 0.0), window).sum(-1)
    mean = sums / np.where(number, number, 1)
    half = window // 2
    return Curve(
        steps=curve.steps[half : len(values) - half],
        values=np.where(number, mean, np.nan).tolist(),
    )


def difference(curve: Curve, baseline: Curve) -> Curve:
    """``curve - baseline`` at the steps that both have."""
    base = dict(zip(baseline.steps, baseline.values, strict=True))
    pairs = [
        (step, value - base[step])
        for step, value in zip(curve.steps, curve.values, strict=True)
        if step in base
    ]
    return Curve(steps=[step for step, _ in pairs], values=[value for _, value in pairs])
