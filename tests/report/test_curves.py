"""Arithmetic on curves, in closed form."""

import math

from mhc_megatron.report.curves import (
    Curve,
    difference,
    moving_average,
    peak,
    smoothing_window,
    tail_mean,
)


def curve(*values: float) -> Curve:
    return Curve(steps=list(range(1, len(values) + 1)), values=list(values))


def test_a_moving_average_keeps_a_slope_and_stands_in_the_middle() -> None:
    average = moving_average(curve(0, 2, 4, 6, 8), window=3)
    assert average == Curve(steps=[2, 3, 4], values=[2, 4, 6])
    assert moving_average(curve(5, 7), window=1) == curve(5, 7)
    assert len(moving_average(curve(5, 7), window=3)) == 0


def test_a_moving_average_leaves_out_what_is_not_finite() -> None:
    average = moving_average(curve(1, math.nan, 3, math.inf, math.nan, math.nan), window=3)
    assert average.values[:3] == [2, 3, 3]
    assert math.isnan(average.values[3])


def test_a_spike_does_not_spoil_what_follows() -> None:
    average = moving_average(curve(1e30, 1, 1, 1, 1, 1), window=3)
    assert average.values[1:] == [1, 1, 1]


def test_windows_are_odd() -> None:
    windows = [smoothing_window(n, share=0.1) for n in (1, 19, 20, 39, 40, 1000)]
    assert windows == [1, 1, 3, 3, 5, 101]


def test_a_peak_does_not_hide_a_nan() -> None:
    assert peak([1, 3, 2]) == 3
    assert peak([1, math.inf]) == math.inf
    for values in ([math.nan, 1.0], [1.0, math.nan]):
        assert math.isnan(peak(values))


def test_the_tail_is_at_least_one_value() -> None:
    assert tail_mean(curve(9, 1), share=0.05) == 1
    assert tail_mean(curve(*[9.0] * 19, 1, 3), share=0.05) == 2  # 5 % of 21, rounded up: two


def test_a_difference_is_taken_where_both_have_a_step() -> None:
    found = difference(
        Curve(steps=[1, 2, 4], values=[5, 6, 7]), Curve(steps=[2, 3, 4], values=[1, 1, 2])
    )
    assert found == Curve(steps=[2, 4], values=[5, 5])
