"""Memory and time of the recompute policies, and the kernel that rebuilds a block.

    python benchmarks/recompute.py --results benchmarks/results/h100
    python benchmarks/recompute.py --results out --parts stress lanes --stress-steps 24

One part after the other; recompute_<part>.py measures it, and says what it does.
Appends to ``<results>/recompute_memory.jsonl`` and ``recompute_time.jsonl`` (format:
benchmarks/README.md), of which recompute_table.py makes tables and a picture. Exit status 1 if bits
differ, if a stress never ran short of memory, or if its control found nothing. Without a GPU, where
memory is never short, the parts stress and lanes can be tried.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from provenance import append, provenance
from recompute_stage import Size

from mhc_megatron.pipeline.blocks import best_block

PARTS = ("memory", "kernel", "step", "stress", "lanes")
NEED_A_GPU = ("memory", "kernel", "step")


def lines_of(part: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The result lines of a part, without their provenance."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = Size(tokens=args.tokens, channels=args.channels, sublayers=args.sublayers, device=device)
    few = min(12, args.sublayers)
    small = replace(
        size, tokens=min(512, args.tokens), channels=min(512, args.channels), sublayers=few
    )
    if part == "memory":
        from recompute_memory import memory_lines

        yield from memory_lines(size)
    elif part == "kernel":
        from recompute_kernel import kernel_lines
        from timing import copy_bandwidth

        yield from kernel_lines(size, copy_bandwidth())
    elif part == "step":
        from recompute_step import step_lines

        yield from step_lines(replace(size, sublayers=few), args.repetitions)
    elif part == "stress":
        from recompute_stress import stress_line

        yield stress_line(small, args.stress_steps)
    else:
        yield from lanes_lines(small, args.stress_steps)


def lanes_lines(small: Size, steps: int) -> Iterator[dict[str, Any]]:
    """A dense stage of megatron-core's modules; one of experts where Transformer Engine is."""
    from alone import one_process
    from recompute_lanes import lanes_line
    from te_blocks import Size as BlockSize

    dense = BlockSize(
        name="dense",
        channels=small.channels,
        heads=8,
        ffn=2 * small.channels,
        blocks=max(2, small.sublayers // 2),
        tokens=small.tokens,
    )
    with one_process():
        yield lanes_line(dense, steps, engine=False)
        if importlib.util.find_spec("transformer_engine") is None:
            print("no Transformer Engine here: experts on lanes are left out", file=sys.stderr)
            return
        experts = replace(dense, name="experts", heads=4, ffn=256, experts=8, blocks=2)
        yield lanes_line(experts, steps, engine=True)


def main() -> int:
    """Measure and append; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="results folder")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--channels", type=int, default=2560)
    parser.add_argument("--sublayers", type=int, default=60)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--stress-steps", type=int, default=500)
    parser.add_argument("--commit", help="the code measured (default: git's HEAD)")
    args = parser.parse_args()
    if "lanes" in args.parts:  # read when the GPU, and Transformer Engine, are first used
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    on_gpu = torch.cuda.is_available()
    impossible = [part for part in args.parts if part in NEED_A_GPU]
    if impossible and not on_gpu:
        needing = " ".join(impossible)
        parser.error(
            f"--parts {needing}: needs a GPU, and torch sees none; try --parts stress lanes"
        )
    source, found = provenance(args.commit), []
    args.results.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        for line in lines_of(part, args):
            found.append(line)
            append(args.results, line, source)
            ratio = f"{line['ratio_to_floor']:.4f} x floor" if line["floor"] else ""
            print(
                f"{line['impl']:<36} {line['metric']:<24} L={line['shape']['L']:<3}"
                f"{line['value']:>16,} {line['unit']:<6}{ratio}",
                flush=True,
            )
        if on_gpu:
            torch.cuda.empty_cache()
    blocks = [line for line in found if line["metric"] == "activations" and line["shape"]["block"]]
    if blocks:
        best = best_block(num_sublayers=args.sublayers, num_streams=Size.streams)
        lowest = min(blocks, key=lambda line: line["value"])["shape"]["block"]
        print(f"lowest measured at block {lowest}, predicted {best}")
    idle = [line["impl"] for line in found if on_gpu and line.get("alloc_retries") == 0]
    if idle:
        print(f"memory was never short for {', '.join(idle)}", file=sys.stderr)
    # Experts' counts make the host wait for the GPU, which hides what is freed too early.
    controls = [line["control"]["mismatches"] for line in found if "control" in line]
    blind = bool(controls) and not any(controls)
    if blind:
        print("the control found nothing, so neither could the stress on lanes", file=sys.stderr)
    differ = any(line.get("deterministic") is False for line in found)
    return int(bool(idle or blind) or differ)


if __name__ == "__main__":
    sys.exit(main())
