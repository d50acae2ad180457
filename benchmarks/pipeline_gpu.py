"""Pipelines whose ranks share one GPU, a stream each: equal to a serial run to the last bit?

    python benchmarks/pipeline_gpu.py --results benchmarks/results/h100 --workers 12
    python benchmarks/pipeline_gpu.py --results out --ranks 2 --seeds 1 --hidden 32 --seq 16

GPT chunks with hyper-connections in bf16. Every seed draws parameters, micro-batches and delays of
the ranks; its losses and all its gradients are compared with a plain loop. Then a few seeds with
messages that do not wait for their sender's stream, where a comparison that never fails would show.
Appends one line per schedule and number of ranks to ``<results>/pipeline.jsonl`` (format:
benchmarks/README.md), with the time of a step without delays. Exit status 1 after a mismatch.

Small chunks keep the host busier than the GPU, so processes beside each other share the seeds, and
the GPUs if there are several.
Without a GPU the ranks are threads, and there is no order of streams to lose.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from alone import one_process
from one_gpu import one_gpu
from provenance import append, provenance
from virtual_ranks import Step, VirtualRanks, run_config

from mhc_megatron.pipeline.phases import OverlapMode

SCHEDULES = ("zb_h1", "dualpipe_v", "dualpipe")
CONTROLS, TIMED = 8, 3


def check(ranks: VirtualRanks, seeds: range, seconds: float) -> tuple[int, list[str]]:
    """Seeds that were run within ``seconds``, and what differed: ``seed 3: losses, ...``."""
    deadline, found = time.monotonic() + seconds, []
    for count, seed in enumerate(seeds, start=1):
        ranks.draw(seed)
        differences = ranks.pipelined_against_serial(seed)
        if differences:
            found.append(f"seed {seed}: {len(differences)} differ: {', '.join(differences[:4])}")
        if time.monotonic() > deadline:
            return count, found
    return len(seeds), found


def check_elsewhere(num_workers: int) -> list[tuple[int, list[str]]]:
    """``check`` of every line with the seeds shared by processes with this one's arguments.

    They share the GPUs as well.
    """
    command = [sys.executable, *sys.argv]
    workers = [
        subprocess.Popen(
            [*command, "--share", f"{i}/{num_workers}"],
            stdout=subprocess.PIPE,
            env=os.environ | one_gpu(i),
        )
        for i in range(num_workers)
    ]
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit("a worker failed; its message is above")
    shares = [
        [json.loads(line) for line in output.splitlines() if line.startswith(b"[")]
        for output in outputs
    ]
    return [
        (sum(count for count, _ in line), [text for _, found in line for text in found])
        for line in zip(*shares, strict=True)
    ]


def faults_found(ranks: VirtualRanks) -> int:
    """Of CONTROLS steps without any order between streams, how many are found to be wrong."""
    found = 0
    for seed in range(CONTROLS):
        ranks.draw(seed)
        found += bool(ranks.pipelined_against_serial(seed, ordered=False))
    return found


def milliseconds(step: Callable[[], Step], device: torch.device) -> list[float]:
    """Wall times of TIMED steps."""
    times = []
    for _ in range(TIMED):
        _synchronize(device)
        start = time.perf_counter()
        step()
        _synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(ranks: VirtualRanks, checked: tuple[int, list[str]]) -> dict[str, Any]:
    """The line of one schedule and number of ranks, without its provenance."""
    config, device = ranks.config, ranks.device
    num_seeds, differences = checked
    for line in differences:
        print(line, file=sys.stderr)
    on_gpu = device.type == "cuda"
    ranks.draw(0)
    control = {"seeds": CONTROLS, "mismatches": faults_found(ranks)} if on_gpu else None
    serial = milliseconds(ranks.serial, device)
    times = milliseconds(ranks.pipelined, device)
    model = config.model
    return {
        "benchmark": "pipeline",
        "impl": f"mhc_megatron.{config.parallel.schedule}",
        "shape": {
            "ranks": config.parallel.pipeline,
            "micro_batches": config.num_micro_batches,
            "T": model.seq_length,
            "C": model.hidden_size,
            "n": config.mhc.num_streams,
            "layers": model.num_layers,
            "overlap": config.parallel.overlap,
            "dtype": config.dtype,
        },
        "metric": "step_in_one_process",
        "value": statistics.median(times),
        "unit": "ms",
        "spread": [min(times), max(times)],
        "serial": statistics.median(serial),
        "launch": "eager",
        "seeds": num_seeds,
        "mismatches": len(differences),
        "control": control,
        "deterministic": not differences,
    }


def virtual_ranks(
    schedule: str, num_ranks: int, device: torch.device, args: argparse.Namespace
) -> VirtualRanks:
    """The ranks of one line."""
    sizes = {"hidden_size": args.hidden, "seq_length": args.seq, "overlap": args.overlap}
    return VirtualRanks(run_config(schedule, num_ranks, **sizes), device)


def main() -> int:
    """Check, measure and append; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="results folder")
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES, choices=SCHEDULES)
    parser.add_argument(
        "--overlap",
        default="none",
        choices=get_args(OverlapMode),
        help="of the schedules that pair forwards with backwards, the others are left out",
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8], metavar="P")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument(
        "--seconds",
        type=float,
        default=600.0,
        help="per line: after these no other seed is drawn (default: %(default)g)",
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that share the seeds")
    parser.add_argument("--share", metavar="I/N", help=argparse.SUPPRESS)
    parser.add_argument("--hidden", type=int, default=256, metavar="C")
    parser.add_argument("--seq", type=int, default=128, metavar="S")
    parser.add_argument("--commit", help="the code measured (default: git's HEAD)")
    args = parser.parse_args()
    # Kernels whose sums may take another order when several streams are busy.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_num_threads(1)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    every = args.overlap == "none"
    names = [name for name in args.schedules if every or name.startswith("dualpipe")]
    shapes = [(name, count) for count in args.ranks for name in names]
    with one_process(backend="gloo"):  # nothing is sent
        if args.share is not None:
            index, count = map(int, args.share.split("/"))
            for shape in shapes:
                share = range(index, args.seeds, count)
                print(json.dumps(check(virtual_ranks(*shape, device, args), share, args.seconds)))
            return 0
        checked = check_elsewhere(args.workers) if args.workers else [None] * len(shapes)
        source, failed = provenance(args.commit), False
        args.results.mkdir(parents=True, exist_ok=True)
        for (name, num_ranks), found in zip(shapes, checked, strict=True):
            ranks = virtual_ranks(name, num_ranks, device, args)
            line = measure(ranks, found or check(ranks, range(args.seeds), args.seconds))
            append(args.results, line, source)
            print(
                f"{name:<12} {num_ranks} ranks: {line['mismatches']} mismatches in "
                f"{line['seeds']} seeds, control {line['control']}, step {line['value']:.1f} "
                f"ms (serial {line['serial']:.1f})",
                flush=True,
            )
            blind = line["control"] is not None and not line["control"]["mismatches"]
            if blind:
                print(f"{name}: the control found no fault", file=sys.stderr)
            failed |= bool(line["mismatches"]) or blind
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
