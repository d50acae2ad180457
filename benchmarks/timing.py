"""Times of GPU work: CUDA-graph replays, eager launches, and the bandwidth of a plain copy."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import engine
import torch

from mhc_megatron.kernels.native.programs import Programs


class Times(NamedTuple):
    """Microseconds per call: median, least and most of the repetitions."""

    median: float
    least: float
    most: float


def graph_times(calls: list[Callable[[], object]], *, repetitions: int = 20) -> Times:
    """Replays of one CUDA graph that makes all calls, one after the other.

    Args:
        calls: the same work on different tensors, so that the L2 cache holds no input of the next.
        repetitions: replays, each timed by itself.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    return _event_times(graph.replay, len(calls), repetitions)


def backward_times(
    calls: list[tuple[Callable[[], list[torch.Tensor]], Callable[[list[torch.Tensor]], object]]],
    *,
    repetitions: int = 20,
) -> Times:
    """Replays of the second halves of (forward, backward of its outputs).

    Autograd runs a backward on its forward's stream, so both are made on the captured one.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outputs = [forward() for forward, _ in calls]
        for (_, backward), out in zip(calls, outputs, strict=True):
            backward(out)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for (_, backward), out in zip(calls, outputs, strict=True):
            backward(out)
    graph.replay()
    return _event_times(graph.replay, len(calls), repetitions)


def eager_times(call: Callable[[], object], *, repetitions: int = 30) -> Times:
    """Wall time per call of ten calls in a row: the host's work or the GPU's, whichever is more."""
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        for _ in range(10):
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / 10 * 1e6)
    return Times(statistics.median(times), min(times), max(times))


def host_times(call: Callable[[], object], *, repetitions: int = 30) -> Times:
    """Time until the call returns, with an idle GPU behind it: the launches alone."""
    for _ in range(5):
        call()
    times = []
    for _ in range(repetitions):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return Times(statistics.median(times), min(times), max(times))


def kernel_profile(call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of a call's kernels by name, one after the other; empty where none are seen."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = profiler.key_averages()
    return {event.key: event.self_device_time_total / 1e3 for event in events}


class _Nothing(torch.autograd.Function):
    """One output of as many operands as a boundary has; no work in either direction."""

    @staticmethod
    def forward(ctx: Any, first: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return first.view_as(first)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad, None, None, None, None, None, None, None


def host_floor(pairs: int = 1) -> float:
    """Microseconds of the host for forward and backward of an autograd function without work, of so
    many in one backward by each."""
    operands = torch.ones(pairs, 8, 8, device="cuda").unbind()
    leaves = [[leaf.requires_grad_() for leaf in rows.unbind()] for rows in operands]
    grads = [torch.ones(8, device="cuda")] * pairs

    def call() -> None:
        outputs = [_Nothing.apply(*of_one) for of_one in leaves]
        engine.gradients(outputs, [first for first, *_ in leaves], grads)

    return host_times(call).median / pairs


@contextmanager
def launched_by_python() -> Iterator[None]:
    """As where the extension is not built."""
    run = Programs.run
    Programs.run = lambda *_: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Programs.run = run  # type: ignore[method-assign]


def host_launch(launches: int = 8) -> float:
    """Microseconds of the host per launch, of torch's own smallest kernel and as many in a row."""
    numbers = torch.ones(8, device="cuda")

    def launch() -> None:
        for _ in range(launches):
            numbers.zero_()

    return host_times(launch).median / launches


def copy_bandwidth(num_bytes: int = 2**30) -> float:
    """Bytes read and written per second by a device-to-device copy kernel."""
    source = torch.empty(num_bytes // 4, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    # A kernel: a copy node of a graph runs on the slower copy engine.
    times = graph_times([lambda: torch.add(source, 1.0, out=target)], repetitions=20)
    return 2 * num_bytes / (times.median * 1e-6)


def _event_times(call: Callable[[], object], calls: int, repetitions: int) -> Times:
    start = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions)]
    stop = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions)]
    for i in range(repetitions):
        start[i].record()
        call()
        stop[i].record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) * 1e3 / calls for a, b in zip(start, stop, strict=True)]
    return Times(statistics.median(times), min(times), max(times))
