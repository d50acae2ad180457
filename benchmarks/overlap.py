"""A forward and a backward of one pipeline stage: one after the other, and interleaved on lanes.

    python benchmarks/overlap.py --results benchmarks/results/h100 --pictures out
    python benchmarks/overlap.py --results benchmarks/results/h100 --padded --launches eager graph
    python benchmarks/overlap.py --results out --models tiny --repetitions 2

The stage is that of ``te_blocks.py``, with recompute ``auto``. For each overlap mode: the time of
the pair, whether its gradients have the bits of mode ``none``, and the planner's prediction. That
comes from the phases' times, measured one after the other on a single lane, and from how much lanes
slow each other down, measured as ``overlap_slowdown.py`` says. On a GPU a profile then says how
much of the work on the priority lane is hidden, and is drawn into ``--pictures``.

Launched as a CUDA graph, a pair does not depend on the host; with ``--padded`` the dispatcher does
not wait for the GPU either, which a graph needs.

One GPU has nobody to exchange tokens with. An exchange is a copy of them and a wait, as long as
they would take at ``--gigabytes-per-second``, on the communication lane.
Appends to ``<results>/overlap.jsonl`` (format: benchmarks/README.md) as it goes. Exit status 1 if
bits differ.
"""

import argparse
import functools
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import cudnn_first  # noqa: F401
import torch
from alone import one_process
from captured import side_stream
from overlap_costs import MeasuredCosts, phase_costs, time_of
from overlap_exchange import let_exchange, wait_of
from overlap_pair import WARM_UP, GraphedPair, Pair, bits_of, release
from overlap_slowdown import measured_slowdowns, slowdowns_json
from overlap_steps import compared, step_ends
from overlap_trace import hidden_lines
from provenance import append, provenance
from ranks import layouts
from te_blocks import SIZES, STREAMS, Size, Stage, megatron_config

from mhc_megatron.config import MHCConfig
from mhc_megatron.megatron.delayed_wgrad import delay_weight_gradients
from mhc_megatron.megatron.phases import Lanes
from mhc_megatron.pipeline.interleave import PhaseCost, interleave
from mhc_megatron.pipeline.lanes import Slowdowns, simulate_lanes
from mhc_megatron.pipeline.phases import Lane, OverlapMode, Phase, Step

MODES: tuple[OverlapMode, ...] = get_args(OverlapMode)
# For a try without a GPU.
TINY = {
    size.name: size
    for size in (
        Size(name="tiny", channels=64, heads=2, ffn=64, experts=8, blocks=2, tokens=16),
        Size(name="tiny-dense", channels=64, heads=8, ffn=64, blocks=2, tokens=16),
    )
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
    wait = wait_of(args.gigabytes_per_second, device)
    let_exchange(stage.chunk, wait)
    lanes = Lanes(device)
    modes = [mode for mode in MODES if mode == "none" or mode in args.modes]
    measured = {
        mode: phase_costs(stage, mode, wait, device, args.repetitions, launch) for mode in modes[1:]
    }
    slowdowns = measured_slowdowns(stage, lanes, wait, device, args.repetitions, launch)
    release()
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

    planners = {
        mode: functools.partial(interleave, costs=found.costs) for mode, found in measured.items()
    }

    def pair_of(mode: OverlapMode) -> Pair | GraphedPair:
        pair = Pair(stage, mode, lanes, planners.get(mode, interleave))
        return GraphedPair(stage, pair) if launch == "graph" else pair

    ends = {
        mode: step_ends(stage, mode, lanes, planner, device, args.repetitions, launch)
        for mode, planner in planners.items()
    }
    release()
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
                line |= predictions(mode, pairs[mode].phases, measured[mode], slowdowns, ends[mode])
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
        release()


def predictions(
    mode: OverlapMode,
    phases: tuple[Phase, ...],
    measured: MeasuredCosts,
    slowdowns: Slowdowns,
    ends: Mapping[Step, float],
) -> dict[str, Any]:
    """Milliseconds of the pair and of its priority lane by the planner's reckoning, and of what."""
    costs = measured.costs
    plan = interleave(phases, phases, costs, rebuild=mode in ("recompute", "all"))
    alone = simulate_lanes(plan, phases, phases, costs)
    spans = simulate_lanes(plan, phases, phases, costs, slowdowns)
    priority = sum(span.end - span.start for span in alone if span.lane is Lane.PRIORITY)
    return {
        "predicted": round(max(span.end for span in spans), 3),
        "predicted_alone": round(max(span.end for span in alone), 3),
        "priority": round(priority, 3),
        "slowdowns": slowdowns_json(slowdowns),
        "without_pauses": round(measured.without_pauses, 4),
        "costs": {name: rounded(cost) for name, cost in costs.items()},
        **compared(ends, spans, costs),
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
        text += f", predicted {line['predicted']:.3f} ({ratio:.2f} times), "
        text += f"{line['predicted_alone']:.3f} if lanes did not slow each other down"
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
    # Fused attention adds up in another order every time, unless it is told not to.
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
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
