"""Fused kernels, the reference, torch.compile of it and installed peers, on the same tensors.

    python benchmarks/kernels.py --results benchmarks/results/h100
    python benchmarks/kernels.py --shapes 4096,2560,4 --impl post_pre pre+post
    python benchmarks/kernels.py --shapes 4096,2560,4 --impl post_pre --tiles tuned.json

Checks each against float64, then times forward, backward and both, by CUDA-graph replay and by
eager launch. Prints a table and appends one line per figure to ``<results>/kernels.jsonl``.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ends
import torch
from contenders import ENDS, OURS, Build, builds_with, check
from implementations import (
    PEERS,
    Implementation,
    Operands,
    forward_backward,
    random_operands,
)
from provenance import provenance
from timing import (
    Times,
    backward_times,
    copy_bandwidth,
    eager_times,
    graph_times,
    host_floor,
    host_launch,
    host_times,
    launched_by_python,
)

from mhc_megatron.kernels import native
from mhc_megatron.kernels.triton.tiles import Tile, Tiles

SHAPES = "4096,1280,4 8192,1920,4 4096,2560,4 8192,4096,4 4096,7168,4 4096,2560,2 4096,2560,8"
# Copies of the operands that a graph goes through, so that no input is left in the L2 cache.
COPIES = 3
# Sublayers whose backward is one.
PAIRS = 8
# Times of the host, and how many backwards are one; the last without the extension.
HOST = {"host": 1, "host_stage": PAIRS, "python_stage": PAIRS}
# No multiple of a tile, but of 16: what peers tuned for is then compiled once.
CHECKED_TOKENS = 304


def tiles_of(path: Path | None) -> dict[int, Tiles]:
    """By number of streams, what tune_kernels.py wrote; none for None."""
    if path is None:
        return {}
    found = json.loads(path.read_text())
    tiles = {
        name: Tile(**value) if isinstance(value, dict) else value
        for name, value in found["tiles"].items()
    }
    return {found["num_streams"]: Tiles(**tiles)}


def floor_elements(n: int, *, fused: bool) -> tuple[int, int]:
    """Channels per token that forward and backward must move (docs/performance.md)."""
    return (2 * n + 2, 3 * n + 3) if fused else (3 * n + 2, 6 * n + 3)


def floor_bytes(tokens: int, channels: int, n: int, itemsize: int, *, fused: bool) -> list[int]:
    """Of forward, backward and both; phi is read in each and its gradient written once."""
    forward, backward = floor_elements(n, fused=fused)
    phi = 4 * n * (n + 2) * n * channels
    figures = [tokens * channels * itemsize * forward + phi]
    figures.append(tokens * channels * itemsize * backward + 2 * phi)
    return [*figures, sum(figures)]


def measure(build: Build, data: list[Operands]) -> Iterator[tuple[str, str, Times]]:
    """(metric, launch, times) of one implementation."""
    built = [build(operands) for operands in data]

    def both(one: Implementation) -> object:
        return one.backward(one.forward())

    if built[0].name != "torch.compile":
        forwards = [one.forward for one in built]
        yield "fwd", "graph", graph_times(forwards)
        yield "bwd", "graph", backward_times([(one.forward, one.backward) for one in built])
        yield "fwd_bwd", "graph", graph_times([lambda one=one: both(one) for one in built])
    yield "fwd", "eager", eager_times(built[0].forward)
    yield "fwd_bwd", "eager", eager_times(lambda: both(built[0]))
    yield "fwd_bwd", "host", host_times(lambda: both(built[0]))
    # As in a step: autograd starts once, and not for every sublayer.
    stage = [build(data[i % len(data)]) for i in range(PAIRS)]
    times = host_times(lambda: forward_backward(stage))
    yield "fwd_bwd", "host_stage", Times(*(time / PAIRS for time in times))
    if built[0].name.startswith("mhc_megatron") and native.availability()[0]:
        with launched_by_python():
            times = host_times(lambda: forward_backward(stage))
        yield "fwd_bwd", "python_stage", Times(*(time / PAIRS for time in times))


def run_shape(
    shape: tuple[int, int, int],
    names: list[str],
    bandwidth: float,
    tiles: Tiles | None,
    source: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    tokens, channels, n = shape
    builds = builds_with(tiles)
    dtype = torch.bfloat16
    data = [random_operands(tokens, n, channels, dtype, seed) for seed in range(COPIES)]
    small = random_operands(min(CHECKED_TOKENS, tokens), n, channels, dtype, 99)
    for name in names:
        try:
            built = builds[name](small)
            errors, deterministic = check(small, built)
            sizes = (tokens, channels, n, dtype.itemsize)
            if built.end is None:
                floors = floor_bytes(*sizes, fused=built.fused)
            else:
                floors = ends.floor_bytes(*sizes, operation=built.end)
            for metric, launch, times in measure(builds[name], data):
                moved = floors[("fwd", "bwd", "fwd_bwd").index(metric)]
                of_host = launch in HOST
                floor = host_floor(HOST[launch]) if of_host else moved / bandwidth * 1e6
                yield {
                    "benchmark": "kernels",
                    "impl": built.name,
                    "shape": {"T": tokens, "C": channels, "n": n, "dtype": "bfloat16"},
                    "metric": metric,
                    "value": round(times.median, 2),
                    "spread": [round(times.least, 2), round(times.most, 2)],
                    "unit": "us",
                    "floor": round(floor, 2),
                    "ratio_to_floor": round(times.median / floor, 3),
                    "gb_per_s": round(moved / times.median / 1e3, 1),
                    "launch": launch,
                    "error": errors,
                    "deterministic": deterministic,
                    **({"launch_us": round(host_launch(), 2)} if of_host else {}),
                    **({} if tiles is None else {"tiles": str(tiles)}),
                    **source,
                }
        except Exception as error:  # a peer that cannot run a shape must not end the others' run
            print(f"{name} at {shape}: {type(error).__name__}: {error}"[:600], file=sys.stderr)
        torch.cuda.empty_cache()


def print_line(line: dict[str, Any]) -> None:
    shape = line["shape"]
    worst = max(line["error"].items(), key=lambda item: item[1])
    print(
        f"{shape['T']:>6} {shape['C']:>5} {shape['n']}  {line['impl']:<28} {line['metric']:<8}"
        f"{line['launch']:<6}{line['value']:>9.1f} us  {line['ratio_to_floor']:>6.2f} x floor"
        f"{line['gb_per_s']:>8.0f} GB/s  worst error {worst[0]} {worst[1]:.1e}"
        f"{'' if line['deterministic'] else '  bits differ'}",
        flush=True,
    )


def installed(name: str) -> bool:
    try:
        PEERS[name](random_operands(16, 4, 1024, torch.bfloat16, 0))
    except ImportError:
        return False
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}"[:300], file=sys.stderr)
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES.split(), help="T,C,n")
    parser.add_argument(
        "--impl", nargs="+", choices=[*OURS, *PEERS, *ENDS], help="default: all installed"
    )
    parser.add_argument("--results", type=Path, help="folder of kernels.jsonl")
    parser.add_argument("--tiles", type=Path, help="from tune_kernels.py --write, for its n")
    parser.add_argument("--commit", help="the code measured (default: git's HEAD)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: needs a GPU", file=sys.stderr)
        return 2
    source, tiles = provenance(args.commit), tiles_of(args.tiles)
    names = args.impl or [*OURS, *filter(installed, PEERS), *ENDS]
    bandwidth = copy_bandwidth()
    print(f"{source['gpu']}: copy {bandwidth / 1e12:.2f} TB/s read and written")
    for text in args.shapes:
        tokens, channels, n = map(int, text.split(","))
        chosen = tiles.get(n)
        for line in run_shape((tokens, channels, n), names, bandwidth, chosen, source):
            line["copy_tb_per_s"] = round(bandwidth / 1e12, 3)
            print_line(line)
            if args.results is not None:
                args.results.mkdir(parents=True, exist_ok=True)
                with (args.results / "kernels.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
