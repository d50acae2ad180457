"""Timelines for chrome://tracing and ui.perfetto.dev."""

import json
from typing import Any

from mhc_megatron.pipeline.actions import Overlap, parts
from mhc_megatron.pipeline.timeline import Timeline

# Microseconds, the format's unit; times without a unit are shown as milliseconds.
_MICROSECONDS = {"us": 1, "ms": 1_000, "s": 1_000_000, "": 1_000}


def to_chrome_trace(timeline: Timeline) -> str:
    """The Trace Event Format: one track per rank, one complete event per action."""
    scale = _MICROSECONDS[timeline.unit]
    schedule = timeline.schedule
    events: list[dict[str, Any]] = [_metadata("process_name", 0, {"name": schedule.name})]
    for rank in range(schedule.num_ranks):
        events.append(_metadata("thread_name", rank, {"name": f"rank {rank}"}))
        events.append(_metadata("thread_sort_index", rank, {"sort_index": rank}))
        for span in timeline.spans(rank):
            computes = parts(span.action)
            overlap = isinstance(span.action, Overlap)
            events.append(
                {
                    "name": str(span.action),
                    "cat": "overlap" if overlap else computes[0].op.value,
                    "ph": "X",
                    "pid": 0,
                    "tid": rank,
                    "ts": span.start * scale,
                    "dur": (span.end - span.start) * scale,
                    "args": {
                        "stages": [compute.stage for compute in computes],
                        "micro-batches": [compute.mb for compute in computes],
                    },
                }
            )
    lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)
    return f'{{"displayTimeUnit":"ms","traceEvents":[\n{lines}\n]}}\n'


def _metadata(name: str, rank: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": 0, "tid": rank, "args": arguments}
