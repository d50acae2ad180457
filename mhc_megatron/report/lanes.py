"""The table of an Overlap's forecast."""

from mhc_megatron.pipeline.forecast import Forecast

_HEADER = ("lane", "busy", "share", "exposed")


def format_lanes(forecast: Forecast) -> str:
    """What a forward beside a backward takes, lane by lane, for a terminal."""
    serial, length = forecast.serial_length, forecast.length
    rows = [_HEADER] + [
        (
            lane.lane.value,
            f"{lane.busy:g}",
            f"{lane.busy / length if length else 0:.1%}",
            f"{lane.exposed:g}",
        )
        for lane in forecast.lanes
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = [
        f"a forward beside a backward takes {length:g}; one after the other {serial:g} "
        f"({length / serial if serial else 1:.3f})"
    ]
    for row in rows:
        name, *numbers = row
        cells = [f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([f"{name:<{widths[0]}}", *cells]))
    return "\n".join([*lines, _slowdowns(forecast)])


def _slowdowns(forecast: Forecast) -> str:
    """What lanes that slow each other down come to."""
    if not forecast.slowdowns.factors:
        return (
            "lanes do not slow each other down here: no slowdowns were given; on a GPU they share "
            "multiprocessors and memory"
        )
    factors = ", ".join(
        f"{lane.value} beside {beside.value} {factor:g}"
        for (lane, beside), factor in forecast.slowdowns.factors.items()
    )
    length, unslowed = forecast.length, forecast.unslowed_length
    return (
        f"slowdowns: {factors}; without them it would take {unslowed:g} "
        f"({length / unslowed if unslowed else 1:.3f} times as long with them)"
    )
