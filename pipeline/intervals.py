"""Arithmetic of sets of time, as sorted lists of disjoint half-open intervals."""

from collections.abc import Iterable
from typing import TypeVar

Interval = tuple[int, int]
_Time = TypeVar("_Time", int, float)


def union(intervals: Iterable[tuple[_Time, _Time]]) -> list[tuple[_Time, _Time]]:
    """Any intervals as a set: sorted, disjoint, touching ones joined, empty ones dropped."""
    merged: list[tuple[_Time, _Time]] = []
    for start, end in sorted(intervals):
        if start >= end:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def intersection(
    left: list[tuple[_Time, _Time]], right: list[tuple[_Time, _Time]]
) -> list[tuple[_Time, _Time]]:
    """What two sets, both from ``union``, have in common; linear in their sizes."""
    common: list[tuple[_Time, _Time]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        start, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < end:
            common.append((start, end))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return common


def length(intervals: list[tuple[_Time, _Time]]) -> _Time:
    """The time that a set from ``union`` covers."""
    return sum(end - start for start, end in intervals)
