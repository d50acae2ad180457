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
    return "\n".join(lines)
