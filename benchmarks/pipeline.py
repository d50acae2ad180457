"""The pipeline executor's own time per action, and how well the simulator foretells a step.

    python benchmarks/pipeline.py --results benchmarks/results/cpu

All ranks run in this process, on the CPU. Overhead: stages that return at once; the CPU time of all
ranks' threads over the number of actions, messages included. Prediction: stages that sleep for
known times; the simulated step over the executed one. Appends one line per figure to
``<results>/pipeline.jsonl`` (format: benchmarks/README.md).
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from torch import Tensor

from mhc_megatron.pipeline.catalogue import generate
from mhc_megatron.pipeline.costs import Costs, StageCosts
from mhc_megatron.pipeline.executor import execute
from mhc_megatron.pipeline.in_process import InProcessTransport, run_ranks
from mhc_megatron.pipeline.lower import lower
from mhc_megatron.pipeline.measure import Spans, timeline_of
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.simulate import simulate
from mhc_megatron.pipeline.stopwatch import HostStopwatch
from mhc_megatron.pipeline.timeline import Timeline
from mhc_megatron.pipeline.transport import Message

SCHEDULES = ("one_f_one_b", "zb_h1", "dualpipe_v", "dualpipe")
MESSAGE = Message(shape=(1,), dtype=torch.float32, device=torch.device("cpu"))
EMPTY = Costs(default=StageCosts(forward=0, dgrad=0, wgrad=0))
KNOWN = Costs(
    unit="ms",
    default=StageCosts(forward=8, dgrad=9, wgrad=6),
    stages={-1: StageCosts(forward=11, dgrad=12, wgrad=7)},
)


class Sleeper:
    """A stage that sleeps for its costs in ms, or returns at once where they are 0."""

    def __init__(self, costs: StageCosts, *, is_first: bool) -> None:
        self._costs, self._is_first = costs, is_first
        self._result = torch.zeros(MESSAGE.shape)

    def forward(self, mb: int, x: Tensor | None) -> Tensor:
        return self._after(self._costs.forward)

    def backward(self, mb: int, grad: Tensor | None, *, defer_weights: bool) -> Tensor | None:
        costs = self._costs
        result = self._after(costs.dgrad if defer_weights else costs.whole_backward)
        return None if self._is_first else result

    def weights(self, mb: int) -> None:
        self._after(self._costs.wgrad)

    def recompute(self, mb: int) -> None: ...

    @property
    def unfinished(self) -> tuple[int, ...]:
        return ()

    def _after(self, milliseconds: float) -> Tensor:
        if milliseconds:
            time.sleep(milliseconds / 1e3)
        return self._result


def run(schedule: Schedule, costs: Costs) -> list[tuple[Spans, float]]:
    """Execute a step; every rank's spans, and the CPU time of its thread in seconds."""
    stages = [
        Sleeper(cost, is_first=number == 0)
        for number, cost in enumerate(costs.of_stages(schedule.num_stages))
    ]
    programs = lower(schedule)

    def rank(transport: InProcessTransport) -> tuple[Spans, float]:
        watch, start = HostStopwatch(), time.thread_time()
        held = schedule.placement.stages_on(transport.rank)
        execute(
            programs[transport.rank],
            {stage: stages[stage] for stage in held},
            transport,
            num_stages=schedule.num_stages,
            message=MESSAGE,
            stopwatch=watch,
        )
        return watch.spans(), time.thread_time() - start

    return run_ranks(rank, schedule.num_ranks)


def overhead(schedule: Schedule, repetitions: int) -> list[float]:
    """Microseconds of CPU time per action, once per repetition."""
    times = [sum(spent for _, spent in run(schedule, EMPTY)) for _ in range(repetitions + 1)]
    return [spent / schedule.num_actions * 1e6 for spent in times[1:]]  # the first one warms up


def prediction(schedule: Schedule, repetitions: int) -> list[float]:
    """Simulated over executed time of a step with known costs, once per repetition."""
    foretold = simulate(schedule, KNOWN).makespan
    return [foretold / executed(schedule).makespan for _ in range(repetitions)]


def executed(schedule: Schedule) -> Timeline:
    """The timeline of a step with known costs."""
    return timeline_of(schedule, [spans for spans, _ in run(schedule, KNOWN)])


def main() -> int:
    """Measure and append; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="results folder")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--commit", help="the code measured (default: git's HEAD)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = provenance(args.commit)
    found: list[dict[str, Any]] = []
    for name in SCHEDULES:
        schedule = generate(name, num_ranks=args.ranks, num_mb=args.micro_batches)
        for metric, unit, values in (
            ("overhead_per_action", "us", overhead(schedule, args.repetitions)),
            ("simulated_over_executed", "1", prediction(schedule, args.repetitions)),
        ):
            line = {
                "benchmark": "pipeline",
                "impl": f"mhc_megatron.{name}",
                "shape": {"ranks": args.ranks, "micro_batches": args.micro_batches},
                "metric": metric,
                "value": statistics.median(values),
                "unit": unit,
                "spread": [min(values), max(values)],
                **source,
            }
            found.append(line)
            print(f"{name:<12} {metric:<24} {line['value']:.3g} {unit}", flush=True)
    args.results.mkdir(parents=True, exist_ok=True)
    with (args.results / "pipeline.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
