"""A trace of torch.profiler (Kineto's JSON) as GPU work, launches and named ranges. No torch."""

import bisect
import difflib
import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhc_megatron.errors import UserError
from mhc_megatron.report.gpu_kinds import Kind, kind_of

_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCH = ("cuda_runtime", "cuda_driver")
_RECORD = "record a step with torch.profiler and ProfilerActivity.CUDA, then export_chrome_trace"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One kernel, copy or fill on the GPU; times in nanoseconds of the trace's clock."""

    kind: Kind
    stream: int
    start: int
    end: int
    correlation: int | None


@dataclass(frozen=True, kw_only=True)
class GpuTrace:
    """One rank's step.

    Attributes:
        work: all GPU work.
        launches: (time, correlation id) of the calls that launched it, by time.
        ranges: (start, end) on the CPU of every ``record_function`` range, by name.
    """

    work: list[Work]
    launches: list[tuple[int, int]]
    ranges: dict[str, list[tuple[int, int]]]

    def launched_in(self, name: str) -> list[list[Work]]:
        """The GPU work of every range ``name``, in order; ranges that launched none are left out.

        A launch belongs to the range during which it was called, by any thread: autograd launches
        a backward from a thread of its own while the range's thread waits.

        Raises:
            UserError: no such range, or none that launched GPU work.
        """
        if name not in self.ranges:
            near = difflib.get_close_matches(name, self.ranges, n=5, cutoff=0.0)
            raise UserError(
                f"--range {name}: no such range in the trace; "
                + (f"the nearest are {', '.join(near)}" if near else "it has no ranges at all")
            )
        by_id: dict[int, list[Work]] = {}
        for item in self.work:
            if item.correlation is not None:
                by_id.setdefault(item.correlation, []).append(item)
        times = [time for time, _ in self.launches]
        found = []
        for start, end in sorted(self.ranges[name]):
            inside = self.launches[
                bisect.bisect_left(times, start) : bisect.bisect_left(times, end)
            ]
            found.append([item for _, number in inside for item in by_id.get(number, ())])
        found = [items for items in found if items]
        if not found:
            raise UserError(f"--range {name}: launched no GPU work; name a range that does")
        return found


def read_trace(path: Path) -> GpuTrace:
    """Read ``.json`` or ``.json.gz``.

    Raises:
        UserError: unreadable, truncated, no Kineto trace, no GPU work, or that of several GPUs.
    """
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        document = json.loads(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: truncated or damaged gzip; copy or record it again") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a readable trace") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON, or truncated ({error}); {_RECORD}") from error
    events = document.get("traceEvents") if isinstance(document, dict) else None
    if not isinstance(events, list):
        raise UserError(f"{path}: no Kineto trace, traceEvents is missing; {_RECORD}")
    try:
        return _parse(events, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no Kineto trace, an event lacks {error}; {_RECORD}") from error


def _parse(events: list[dict[str, Any]], path: Path) -> GpuTrace:
    work: list[Work] = []
    launches: list[tuple[int, int]] = []
    ranges: dict[str, list[tuple[int, int]]] = {}
    devices = set()
    for event in events:
        if event.get("ph") != "X":
            continue
        category = event.get("cat")
        if category in _GPU:
            args = event["args"]
            start, end = _span(event)
            # A copy between GPUs names the one that runs it otherwise.
            devices.add(args["inDevice"] if "inDevice" in args else args["device"])
            work.append(
                Work(
                    kind=kind_of(category, event["name"]),
                    stream=int(args["stream"]),
                    start=start,
                    end=end,
                    correlation=args.get("correlation"),
                )
            )
        elif category in _LAUNCH and "correlation" in event.get("args", {}):
            launches.append((_span(event)[0], event["args"]["correlation"]))
        elif category == "user_annotation":
            ranges.setdefault(event["name"], []).append(_span(event))
    if not work:
        raise UserError(f"{path}: no GPU events, a trace of the CPU alone; {_RECORD}")
    if len(devices) > 1:
        raise UserError(
            f"{path}: work of GPUs {sorted(devices)}; record one process, with one GPU, per file"
        )
    return GpuTrace(work=work, launches=sorted(launches), ranges=ranges)


def _span(event: dict[str, Any]) -> tuple[int, int]:
    """Start and end in nanoseconds; Kineto writes microseconds with three decimals."""
    start = round(event["ts"] * 1000)
    return start, start + round(event["dur"] * 1000)
