"""When each action of an executed step starts and ends."""

import time
from typing import Any, Protocol

import torch

from mhc_megatron.pipeline.measure import Spans


class Stopwatch(Protocol):
    """Notes when each action of a rank starts and ends."""

    def start(self) -> None:
        """An action starts."""
        ...

    def stop(self) -> None:
        """It has ended."""
        ...

    def spans(self) -> Spans:
        """All actions so far, in seconds since the stopwatch was made."""
        ...


class HostStopwatch:
    """Times of the host: for the CPU, whose work is done when a call returns."""

    def __init__(self) -> None:
        self._zero = time.perf_counter()
        self._times: list[float] = []

    def start(self) -> None:
        """As in ``Stopwatch``."""
        self._times.append(time.perf_counter())

    stop = start

    def spans(self) -> Spans:
        """As in ``Stopwatch``."""
        since = [at - self._zero for at in self._times]
        return list(zip(since[::2], since[1::2], strict=True))


class CudaStopwatch:
    """Times of the GPU: events on the current stream, read when ``spans`` is called."""

    def __init__(self) -> None:
        self._zero = self._now()
        self._events: list[Any] = []

    @staticmethod
    def _now() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """As in ``Stopwatch``."""
        self._events.append(self._now())

    stop = start

    def spans(self) -> Spans:
        """As in ``Stopwatch``; waits for the GPU."""
        torch.cuda.synchronize()
        since = [self._zero.elapsed_time(event) / 1e3 for event in self._events]
        return list(zip(since[::2], since[1::2], strict=True))


def stopwatch(device: torch.device) -> HostStopwatch | CudaStopwatch:
    """A stopwatch for work on ``device``; all ranks make theirs at one time, after a barrier."""
    return CudaStopwatch() if device.type == "cuda" else HostStopwatch()
