"""A forward and a backward of one pipeline stage: one after the other, and interleaved on lanes.

    python benchmarks/overlap.py --results benchmarks/results/h100 --pictures out
    python benchmarks/overlap.py --results benchmarks/results/h100 --padded --launches eager graph
    python benchmarks/overlap.py --results out --models tiny --repetitions 2

The stage is that of ``te_blocks.py``, with recompute ``auto``. For each overlap mode: the time of
the pair, whether its gradients have the bits of mode ``none``, and the planner's prediction. That
comes from the phases' times, measured one after the other on a single lane. On a GPU a profile then
says how much of the work on the priority lane is hidden, and is drawn into ``--pictures``.

Launched as a CUDA graph, a pair does not depend on the host; with ``--padded`` the dispatcher does
not wait for the GPU either, which a graph needs.

One GPU has nobody to exchange tokens with. An exchange is a copy of them and a wait, as long as
they would take at ``--gigabytes-per-second``, on the communication lane.
Appends to ``<results>/overlap.jsonl`` (format: benchmarks/README.md) as it goes. Exit status 1 if
bits differ.
"""

import argparse
import functools
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import cudnn_first  # noqa: F401
import torch
from alone import one_process
from captured import capture, side_stream
from overlap_trace import hidden_lines
from provenance import append, provenance
from ranks import layouts
from te_blocks import SIZES, STREAMS, Size, Stage, megatron_config
from torch import Tensor

from mhc_megatron.config import MHCConfig
from mhc_megatron.megatron.chain import chain_of
from mhc_megatron.megatron.chunk_phases import mark_phases
from mhc_megatron.megatron.delayed_wgrad import QueuedWeightGrads, delay_weight_gradients
from mhc_megatron.megatron.overlap import LaneOverlap, PhasedStage
from mhc_megatron.megatron.phases import Lanes
from mhc_megatron.pipeline.interleave import PhaseCost, interleave, serial, simulate_lanes
from mhc_megatron.pipeline.phases import Lane, OverlapMode, Phase, Plan, Step
from mhc_megatron.pipeline.stage import AutogradStage
from mhc_megatron.pipeline.turns import Thread, Turns
from mhc_megatron.recompute import ForwardRecompute

MODES: tuple[OverlapMode, ...] = get_args(OverlapMode)
# For a try without a GPU.
TINY = {
    size.name: size
    for size in (
        Size(name="tiny", channels=64, heads=2, ffn=64, experts=8, blocks=2, tokens=16),
        Size(name="tiny-dense", channels=64, heads=8, ffn=64, blocks=2, tokens=16),
    )
}
WARM_UP = 2
LEAST_WEIGHTS = 0.01  # ms; weight gradients that take less are no step of a plan

Clock = Callable[[], Any]


class OneLane(Lanes):
    """All lanes are the compute lane, so that a phase's time is its own."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._streams = dict.fromkeys(self._streams, self.compute)
        self._between = self.compute  # or what a step of the backward begins with is not timed


class TimedTurns(Turns):
    """Turns that note when each step begins."""

    def __init__(self, plan: Plan, log: list[tuple[Step, Any]], clock: Clock) -> None:
        super().__init__(plan)
        self._log, self._clock = log, clock

    def next(self, thread: Thread) -> Step:
        """As in ``Turns``."""
        step = super().next(thread)
        self._log.append((step, self._clock()))
        return step


class _Exchange(torch.autograd.Function):
    """A copy, then a wait on the same lane; in the backward too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, wait: Callable[[Tensor], None]) -> Tensor:
        ctx.wait = wait
        wait(tensor)
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.wait(grad)
        return grad.clone(), None


def exchange_of(gigabytes_per_second: float, device: torch.device) -> Callable[[Tensor], None]:
    """What waits as long as a tensor's exchange takes."""
    if device.type != "cuda":
        return lambda tensor: time.sleep(tensor.nbytes / gigabytes_per_second / 1e9)
    cycles = 10_000_000
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for event in (start, end):  # the first one loads the kernel
        torch.cuda._sleep(cycles)
        event.record()
    end.synchronize()
    per_second = cycles / start.elapsed_time(end) * 1e3
    return lambda tensor: torch.cuda._sleep(
        int(tensor.nbytes / gigabytes_per_second / 1e9 * per_second)
    )


def let_exchange(chunk: torch.nn.Module, wait: Callable[[Tensor], None]) -> None:
    """Each dispatch and combine of a chunk's tokens, which have nowhere to go, takes its time."""
    chain = chain_of(chunk)
    assert chain is not None
    for layer in chain.layers:
        if not layer.is_moe_layer:
            continue
        dispatcher: Any = layer.mlp.token_dispatcher
        dispatch, combine = dispatcher.token_dispatch, dispatcher.token_combine

        def slow_dispatch(tokens: Tensor, probs: Tensor, dispatch: Any = dispatch) -> Any:
            tokens, probs = dispatch(tokens, probs)
            return _Exchange.apply(tokens, wait), probs

        def slow_combine(tokens: Tensor, *rest: Any, combine: Any = combine, **named: Any) -> Any:
            return _Exchange.apply(combine(tokens, *rest, **named), wait)

        dispatcher.token_dispatch, dispatcher.token_combine = slow_dispatch, slow_combine


class Pair:
    """Forwards and backwards of a stage under one mode.

    Args:
        stage: with hyper-connections, whose chain's recompute is then this pair's.
        mode: of the overlap.
        lanes: of its phases.
        planner, turns: as for ``LaneOverlap``.
    """

    def __init__(
        self,
        stage: Stage,
        mode: OverlapMode,
        lanes: Lanes,
        planner: Callable[..., Plan] = interleave,
        turns: Callable[[Plan], Turns] = Turns,
    ) -> None:
        self._chunk: Any = stage.chunk
        self._data, self.lanes = stage, lanes
        chain = chain_of(stage.chunk)
        assert chain is not None
        self._chain, self._recompute = chain, chain.recompute
        self._dropped: dict[int, ForwardRecompute] = {}
        queued = QueuedWeightGrads(stage.chunk)
        options: dict[str, Any] = {"queued": queued.take if queued else None, "name": mode}
        self.phases: tuple[Phase, ...] = ()
        chain.marker = self._marker = None
        self._stage: AutogradStage = AutogradStage(self._forward, **options)
        if mode != "none":
            mark_phases(stage.chunk, lanes, mode, ends_model=False)
            self._marker = chain.marker
            assert self._marker is not None
            self.phases = self._marker.phases
            ahead = self._marker.rebuilds_ahead
            options["take_dropped"] = self._dropped.pop if ahead else None
            self._stage = PhasedStage(self._forward, self._marker, **options)
        self._overlap = LaneOverlap(lanes, planner, turns)

    def first_forward(self) -> None:
        """Of micro-batch 0."""
        self._chain.marker, self._chain.recompute = self._marker, self._recompute
        self._stage.forward(0, self._input())

    def step(self) -> tuple[Tensor, Tensor]:
        """Micro-batch 1's forward with 0's backward: the output and the input's gradient."""
        forward = (self._stage, 1, self._input())
        if self._marker is None:
            output = self._stage.forward(*forward[1:])
            gradient = self._stage.backward(0, self._data.grad, defer_weights=False)
        else:
            outputs: list[Tensor] = []
            gradients: list[Tensor | None] = []
            backward = (self._stage, 0, self._data.grad)
            self._overlap(forward, backward, outputs.append, gradients.append)
            [output], [gradient] = outputs, gradients
        assert gradient is not None
        return output, gradient

    def last_backward(self) -> None:
        """Of micro-batch 1."""
        self._stage.backward(1, self._data.grad, defer_weights=False)
        self._dropped.clear()

    def _input(self) -> Tensor:
        return self._data.x.detach().clone()

    def _forward(self, mb: int, x: Tensor | None) -> Tensor:
        if self._marker is not None:
            self._marker.start()
        self._chunk.set_input_tensor(x)
        output: Tensor = self._chunk(None, self._data.positions, None)
        if self._marker is not None:
            if self._marker.rebuilds_ahead:
                assert self._recompute is not None
                self._dropped[mb] = self._recompute.take()
            self._marker.end(output)
        return output


class GraphedPair:
    """A ``Pair`` whose three calls are CUDA graphs, which share their memory.

    Args:
        stage: of the pair; its gradients are the graphs' from now on.
        pair: on lanes that begin and end with the current stream.
    """

    def __init__(self, stage: Stage, pair: Pair) -> None:
        self.phases = pair.phases
        self._lanes = pair.lanes if pair.phases else None
        for _ in range(WARM_UP):
            stage.forget()
            pair.first_forward()
            pair.step()
            pair.last_backward()
        stage.forget()
        torch.cuda.synchronize()
        first, _ = self._capture(pair.first_forward)
        step, self._results = self._capture(pair.step, first.pool())
        last, _ = self._capture(pair.last_backward, first.pool())
        self._graphs = first, step, last
        self._gradients = [(tensor, tensor.grad) for tensor in stage.chunk.parameters()]

    def _capture(self, call: Callable[[], Any], pool: Any = None) -> Any:
        def on_lanes() -> Any:
            if self._lanes is not None:  # a backward ends by waiting for all of them
                self._lanes.fork()
            return call()

        return capture(on_lanes, pool)

    def first_forward(self) -> None:
        """As in ``Pair``."""
        for tensor, gradient in self._gradients:
            tensor.grad = gradient
        self._graphs[0].replay()

    def step(self) -> tuple[Tensor, Tensor]:
        """As in ``Pair``; the results are overwritten by the next step."""
        self._graphs[1].replay()
        return self._results

    def last_backward(self) -> None:
        """As in ``Pair``."""
        self._graphs[2].replay()


def bits_of(stage: Stage, pair: Pair | GraphedPair) -> list[Tensor]:
    """Output, input's gradient and all parameters' gradients of a pair and what follows it."""
    stage.forget()
    pair.first_forward()
    found = [tensor.clone() for tensor in pair.step()]
    pair.last_backward()
    gradients = [parameter.grad for parameter in stage.chunk.parameters()]
    return found + [gradient.clone() for gradient in gradients if gradient is not None]


def clock_of(
    device: torch.device, *, in_graph: bool = False
) -> tuple[Clock, Callable[[Any, Any], float]]:
    """What marks a moment on the current stream, and the milliseconds between two of them.

    ``in_graph``: the moment is one of every replay of the graph that is being captured.
    """
    if device.type != "cuda":
        return time.perf_counter, lambda start, end: 1e3 * (end - start)

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True, external=in_graph)
        event.record()
        return event

    def between(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end)

    return mark, between


def time_of(stage: Stage, pair: Pair | GraphedPair, device: torch.device) -> float:
    """Milliseconds of one step of a pair."""
    clock, between = clock_of(device)
    stage.forget()
    pair.first_forward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    pair.step()
    end = clock()
    pair.last_backward()
    return between(start, end)


def phase_costs(
    stage: Stage, mode: OverlapMode, device: torch.device, repetitions: int, launch: str
) -> dict[str, PhaseCost]:
    """Milliseconds of the phases by name, one after the other on one lane."""
    in_graph = launch == "graph"
    clock, between = clock_of(device, in_graph=in_graph)
    times: dict[tuple[str, str], list[float]] = {}

    def planner(forward: Sequence[Phase], backward: Sequence[Phase], *, rebuild: bool) -> Plan:
        return tuple(s for s in serial(forward, backward) if rebuild or s.op != "R")

    log: list[tuple[Step, Any]] = []
    ends: list[Any] = []

    class Watched(Pair):
        def step(self) -> tuple[Tensor, Tensor]:
            log.clear()
            results = super().step()
            ends.append(clock())
            return results

    watched = functools.partial(TimedTurns, log=log, clock=clock)
    pair: Pair | GraphedPair = Watched(stage, mode, OneLane(device), planner, watched)
    if in_graph:
        pair = GraphedPair(stage, pair)
    for repetition in range(repetitions + WARM_UP):
        stage.forget()
        pair.first_forward()
        pair.step()
        pair.last_backward()
        if repetition < WARM_UP:
            continue
        if in_graph:
            torch.cuda.synchronize()
        moments = [moment for _, moment in log] + [ends[-1]]
        for (step, start), after in zip(log, moments[1:], strict=True):
            key = pair.phases[step.phase].name, step.op
            times.setdefault(key, []).append(between(start, after))
    names = {name for name, _ in times}

    def of(name: str, op: str) -> float:
        return statistics.mean(times[name, op]) if (name, op) in times else 0.0

    return {
        name: PhaseCost(
            forward=of(name, "F"),
            dgrad=of(name, "B"),
            wgrad=weights if (weights := of(name, "W")) > LEAST_WEIGHTS else 0.0,
            rebuild=of(name, "R"),
        )
        for name in sorted(names)
    }


def measure(
    size: Size, device: torch.device, args: argparse.Namespace, launch: str
) -> Iterator[tuple[dict[str, Any], str]]:
    """The lines of one stage, without their provenance, each with a line of the table."""
    config = megatron_config(size, None, engine=device.type == "cuda", padded=args.padded)
    if device.type == "cuda":
        delay_weight_gradients(config)
    mhc = MHCConfig(num_streams=STREAMS, recompute="auto")
    stage = Stage(size, config, mhc, None)
    layouts.randomise([stage.chunk], seed=1)
    let_exchange(stage.chunk, exchange_of(args.gigabytes_per_second, device))
    lanes = Lanes(device)
    modes = [mode for mode in MODES if mode == "none" or mode in args.modes]
    costs = {mode: phase_costs(stage, mode, device, args.repetitions, launch) for mode in modes[1:]}
    common = {
        "benchmark": "overlap",
        "launch": launch,
        "shape": {
            "model": size.name,
            "blocks": size.blocks,
            "T": size.tokens * size.sequences,
            "C": size.channels,
            "n": STREAMS,
            "dtype": "bf16",
            "gigabytes_per_second": args.gigabytes_per_second,
            **(
                {} if size.experts is None else {"experts": "padded" if args.padded else "dropless"}
            ),
        },
    }

    def pair_of(mode: OverlapMode) -> Pair | GraphedPair:
        if mode == "none":
            pair = Pair(stage, mode, lanes)
        else:
            pair = Pair(stage, mode, lanes, functools.partial(interleave, costs=costs[mode]))
        return GraphedPair(stage, pair) if launch == "graph" else pair

    expected = bits_of(stage, Pair(stage, "none", lanes))
    alone = 0.0
    # Eager pairs take turns; each graph has memory of its own, and is alone.
    for group in [[mode] for mode in modes] if launch == "graph" else [modes]:
        pairs = {mode: pair_of(mode) for mode in group}
        times: dict[OverlapMode, list[float]] = {mode: [] for mode in group}
        for repetition in range(args.repetitions + WARM_UP):
            for mode, found in times.items():
                milliseconds = time_of(stage, pairs[mode], device)
                if repetition >= WARM_UP:
                    found.append(milliseconds)
        alone = alone or statistics.median(times["none"])
        for mode, found in times.items():
            bits = bits_of(stage, pairs[mode])
            line: dict[str, Any] = {
                **common,
                "impl": f"mhc_megatron.{mode}",
                "metric": "pair",
                "value": round(statistics.median(found), 3),
                "spread": [round(min(found), 3), round(max(found), 3)],
                "unit": "ms",
                "serial": round(alone, 3),
                "mismatches": sum(
                    not torch.equal(a, b) for a, b in zip(bits, expected, strict=True)
                ),
            }
            if mode != "none":
                line |= predictions(mode, pairs[mode].phases, costs[mode])
            yield line, summary(line)
        if device.type == "cuda":
            for mode, pair in pairs.items():
                picture = (
                    args.pictures and args.pictures / f"overlap_{size.name}_{launch}_{mode}.svg"
                )
                for found_line, text in profile(pair, picture):
                    whole = {**common, "impl": f"mhc_megatron.{mode}", **found_line}
                    yield whole, f"{size.name:<6}{launch:<6}{mode:<10}{text}"
        pairs.clear()
        gc.collect()
        torch.cuda.empty_cache()


def predictions(
    mode: OverlapMode, phases: tuple[Phase, ...], costs: Mapping[str, PhaseCost]
) -> dict[str, Any]:
    """Milliseconds of the pair and of its priority lane by the planner's reckoning, and of what."""
    plan = interleave(phases, phases, costs, rebuild=mode in ("recompute", "all"))
    spans = simulate_lanes(plan, phases, phases, costs)
    priority = sum(span.end - span.start for span in spans if span.lane is Lane.PRIORITY)
    return {
        "predicted": round(max(span.end for span in spans), 3),
        "priority": round(priority, 3),
        "costs": {name: rounded(cost) for name, cost in costs.items()},
    }


def rounded(cost: PhaseCost) -> list[float]:
    """Milliseconds of forward, dgrad, wgrad and rebuild."""
    return [round(ms, 3) for ms in (cost.forward, cost.dgrad, cost.wgrad, cost.rebuild)]


def summary(line: dict[str, Any]) -> str:
    """A pair's line of the table."""
    mode = line["impl"].removeprefix("mhc_megatron.")
    text = f"{line['shape']['model']:<6}{line['launch']:<6}{mode:<10}{line['value']:>10.3f} ms, "
    text += f"{line['mismatches']} mismatches"
    if "predicted" in line:
        ratio = line["value"] / line["predicted"]
        text += f", predicted {line['predicted']:.3f} ({ratio:.2f} times)"
    return text


def profile(pair: Pair | GraphedPair, picture: Path | None) -> Iterator[tuple[dict[str, Any], str]]:
    """What a profiled step hides: lines without what they share, each with its text."""
    pair.first_forward()
    torch.cuda.synchronize()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    ) as profiler:
        pair.step()
        torch.cuda.synchronize()
    pair.last_backward()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        yield from hidden_lines(trace, picture)


def main() -> int:
    """Measure and append; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="results folder")
    parser.add_argument("--pictures", type=Path, help="folder for the profiles' pictures")
    sizes = {**SIZES, **TINY}
    parser.add_argument("--models", nargs="+", default=["27B"], choices=list(sizes))
    parser.add_argument("--blocks", type=int, help="of the stage (default: the model's)")
    parser.add_argument(
        "--sequences", type=int, default=1, help="of a micro-batch (default: %(default)s)"
    )
    parser.add_argument(
        "--modes", nargs="+", default=list(MODES), choices=MODES, help="beside none (default: all)"
    )
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument(
        "--padded", action="store_true", help="experts' tokens padded to an even share"
    )
    parser.add_argument("--launches", nargs="+", default=["eager"], choices=["eager", "graph"])
    parser.add_argument(
        "--gigabytes-per-second",
        type=float,
        default=50.0,
        help="of an exchange; 50 is what a port of 400 Gb/s carries (default: %(default)g)",
    )
    parser.add_argument("--commit", help="the code measured (default: git's HEAD)")
    args = parser.parse_args()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    source, mismatches = provenance(args.commit), 0
    graphed = "graph" in args.launches
    if graphed and not (device.type == "cuda" and args.padded):
        parser.error("--launches graph needs a GPU, and --padded: the host must not wait for it")
    for folder in filter(None, (args.results, args.pictures)):
        folder.mkdir(parents=True, exist_ok=True)
    with one_process(cuda_graph=graphed), side_stream(device):
        for name in args.models:
            size = replace(sizes[name], sequences=args.sequences)
            if args.blocks is not None:
                size = replace(size, blocks=args.blocks)
            for launch in args.launches:
                for line, text in measure(size, device, args, launch):
                    mismatches += line.get("mismatches", 0)
                    append(args.results, line, source)
                    print(text, flush=True)
    return int(mismatches > 0)


if __name__ == "__main__":
    sys.exit(main())
