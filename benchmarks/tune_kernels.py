"""The fastest tile of each kernel at one shape, from a grid of candidates.

    python benchmarks/tune_kernels.py --shapes 4096,2560,4 --workers 12

Candidates compile in worker processes first (Triton's cache on disk passes them on), then each is
timed by CUDA-graph replay in this process. Prints a line per candidate, and the best as a ``Tiles``
to put into kernels/triton/tiles.py. Run ``tests/kernels`` after changing the table.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from implementations import Operands, options, random_operands
from timing import graph_times
from torch import Tensor

from mhc_megatron.kernels.triton import backward_launch, launch
from mhc_megatron.kernels.triton.arguments import Parameters
from mhc_megatron.kernels.triton.plan import Plan, plan_of
from mhc_megatron.kernels.triton.tiles import Tile, Tiles, default_tiles

COPIES = 3
# Sublayers per launch of the rebuild.
REBUILT = 8


def grid(tokens: str, channels: str, warps: str, stages: str) -> list[Tile]:
    """All combinations whose threads have 4 to 64 numbers of a tile each."""
    numbers = [
        [int(number) for number in text.split()] for text in (tokens, channels, warps, stages)
    ]
    tiles = [
        Tile(tokens=t, channels=c, num_warps=w, num_stages=s)
        for t, c, w, s in itertools.product(*numbers)
    ]
    return [tile for tile in tiles if 4 <= tile.tokens * tile.channels / tile.num_warps / 32 <= 64]


def one_chunk(tiles: list[Tile]) -> list[Tile]:
    """Each with programs of one tile's channels."""
    return [replace(tile, span=tile.channels) for tile in tiles]


def spans(tiles: list[Tile], channels: str) -> list[Tile]:
    """Each with programs of so many channels."""
    return [replace(tile, span=int(span)) for tile in tiles for span in channels.split()]


CANDIDATES = {
    "mix": grid("16 32", "32 64", "4 8", "2 3 4") + grid("16 32 64", "64 128", "8", "2"),
    "pre": grid("16 32 64", "64", "4 8", "2 3 4"),
    "hopper_mix": grid("32 64", "64", "4 8", "2 3 4"),
    "hopper_read": grid("4 8 16", "64 128 256", "1 2 4", "2 3 4"),
    "post": one_chunk(grid("8 16", "128 256 512", "4 8", "1")),
    "rebuild": grid("4 8 16", "64 128 256 512", "4 8", "1"),
    "mix_backward": grid("4 8 16 32", "64 128 256", "1 2 4 8", "2 3"),
    "streams_backward": grid("16 32", "32 64", "4 8", "1 2 3"),
    "post_backward": grid("1 2 4 8 16", "128 256", "1 2 4 8", "1 2 3"),
    "pre_backward": grid("16 32 64", "64 128 256", "4 8", "2 3 4"),
    "hopper_pre_backward": grid("64 128", "64 128", "4 8", "2 3"),
    "weight_backward": grid("64 128", "64 128 256", "4 8", "3 4"),
    "hopper_weight": grid("64 128", "128 256", "8", "2 3 4"),
}

# Of more than four streams, instead of the above.
WIDE_CANDIDATES = {
    "mix": grid("2 4 8 16 32", "64 128", "1 2 4 8", "2 3 4"),
    "post": grid("1 2 4 8", "128 256 512", "1 2 4 8", "1 2 3 4"),
    "project": spans(grid("64 128 256", "32 64", "4 8", "2 3 4"), "1280 2560 5120"),
    "mix_backward": grid("16 32", "32 64", "4 8", "2 3"),
    "post_backward": grid("1 2 4 8", "64 128 256", "1 2 4 8", "2 3 4"),
    "pre_backward": grid("64 128", "32 64 128", "4 8", "2 3"),
}
# Of both parts of a pair only one is launched: the latter where there is a tile for it.
PRE_BACKWARD = ("pre_backward", "hopper_pre_backward")
WEIGHT_BACKWARD = ("weight_backward", "hopper_weight")
MIX = ("mix", "pre", "project"), ("hopper_mix", "hopper_read")

# Launched for up to four streams alone.
NARROW = ("pre", "hopper_mix", "hopper_read", "streams_backward", *WEIGHT_BACKWARD)

KERNELS = ["project", *CANDIDATES]

# Kernels whose programs take a part of the tokens, and the field that says how many.
SPLITS = {
    "weight_backward": "weight_split",
    "pre_backward": "pre_split",
    "hopper_pre_backward": "hopper_pre_split",
    "hopper_weight": "hopper_weight_split",
}


def calls(kernel: str, data: list[Operands], tiles: Tiles) -> list[Callable[[], object]]:
    """One launch of ``kernel`` per copy of the operands, as ``post_pre``, ``pre`` or ``post``
    makes it."""
    made = []
    if kernel == "pre_backward":
        tiles = replace(tiles, hopper_pre_backward=None)
    elif kernel in MIX[0]:
        tiles = replace(tiles, hopper_mix=None)
    elif kernel == "weight_backward":
        tiles = replace(tiles, hopper_weight=None)
    for one in data:
        parameters = Parameters(one.weight, *one.alphas.split(1), one.bias)
        post = (one.streams, one.branch, None, one.packed)
        if kernel == "post":
            plan = plan_of(*post[:3], tiles=tiles)
            made.append(partial(launch.post, plan, None, *post))
            continue
        if kernel == "rebuild":
            made.append(rebuild_call(one, tiles.rebuild))
            continue
        if kernel == "post_backward":
            plan = plan_of(*post[:3], tiles=tiles)
            backward, nobody = backward_launch.streams_backward, (None, None, None)
            if plan.wide:
                backward, nobody = backward_launch.wide_streams_backward, (None, None)
            made.append(partial(backward, plan, None, None, one.grad_streams, *post, *nobody))
            continue
        if kernel == "pre":
            plan = plan_of(one.streams, options=options(), tiles=tiles)
            factors, _ = launch.factor_weight(plan, None, one.weight)
            alone = (None, one.streams, None, None, None, factors, parameters, None)
            made.append(partial(launch.mix, plan, *alone))
            continue
        # The forward in the default tiles where it is not measured.
        default = plan_of(*post[:3], options=options())
        plan = plan_of(*post[:3], options=options(), tiles=tiles)
        factors, kept_factors = launch.factor_weight(plan, None, one.weight)
        mixed = (None, *post, factors, parameters, None)
        if kernel in MIX[0] + MIX[1]:
            made.append(partial(launch.mix, plan, *mixed))
            continue
        streams, _, raw, packed, _ = launch.mix(default, *mixed)
        if kernel in PRE_BACKWARD:
            plan = plan_of(streams, options=options(), tiles=tiles)
        scratch = backward_launch.scratch_of(plan)
        first = (streams, one.grad_u, one.grad_packed, raw, packed, parameters, None, None)
        mix_backward = partial(backward_launch.mix_backward, plan, None, scratch, *first)
        mix_backward()
        read = (one.grad_u, packed, kept_factors)
        if kernel == "mix_backward":
            made.append(mix_backward)
        elif kernel in WEIGHT_BACKWARD:
            made.append(partial(weight_call, plan, scratch, streams, one.weight))
        elif kernel in PRE_BACKWARD:
            operands = (None, scratch, one.grad_streams, streams, *read, one.weight, None)
            made.append(partial(backward_launch.pre_backward, plan, *operands))
        else:
            operands = (None, scratch, one.grad_streams, *post, *read)
            made.append(partial(backward_launch.streams_backward, plan, *operands))
    return made


def weight_call(plan: Plan, scratch: Tensor, streams: Tensor, weight: Tensor) -> None:
    """``weight_bwd`` and the sum of what it leaves."""
    grad = backward_launch.weight_backward(plan, None, scratch, streams, weight, None)
    backward_launch.parameter_backward(plan, None, scratch, grad, None)


def rebuild_call(data: Operands, tile: Tile) -> Callable[[], object]:
    """The rebuild of REBUILT sublayers: branches and mappings are shared, results are not."""
    streams = [torch.empty_like(data.streams) for _ in range(REBUILT - 1)]
    inputs = [torch.empty_like(data.branch) for _ in range(REBUILT)]
    branches, packed = [data.branch] * (REBUILT - 1), [data.packed] * REBUILT
    biases = [None] * (REBUILT - 1)
    return lambda: launch.rebuild(
        data.streams, branches, biases, packed, streams, inputs, tile=tile
    )


def time_of(kernel: str, data: list[Operands], tiles: Tiles, repetitions: int) -> float | None:
    """Microseconds, or None where the candidate does not fit the GPU."""
    try:
        return graph_times(calls(kernel, data, tiles), repetitions=repetitions).median
    except Exception as error:  # out of shared memory or registers: not a candidate
        print(f"{kernel}: {type(error).__name__}: {error}".splitlines()[0][:160], file=sys.stderr)
        return None


def candidates(kernel: str, base: Tiles) -> list[Tile]:
    """Those of the table's number of streams; none of a kernel that it does not launch."""
    if base.project is None:
        return CANDIDATES.get(kernel, [])
    if kernel in NARROW:
        return []
    return WIDE_CANDIDATES.get(kernel) or CANDIDATES[kernel]


def variants(kernels: list[str], base: Tiles) -> list[tuple[str, Tiles]]:
    found = []
    for kernel in kernels:
        for tile in candidates(kernel, base):
            # Fewer products are faster and less exact: shown for the table's tile, never chosen.
            terms = (
                (2, 3)
                if kernel == "streams_backward" and tile == base.streams_backward
                else (base.product_terms,)
            )
            of_split = SPLITS.get(kernel, "weight_split")
            splits = {getattr(base, of_split)} | ({512, 1024, 2048} if kernel in SPLITS else set())
            for term, split in itertools.product(terms, sorted(splits)):
                chosen = {kernel: tile, of_split: split, "product_terms": term}
                found.append((kernel, replace(base, **chosen)))
    return found


def compile_share(share: str, kernels: list[str], data: Operands) -> None:
    """Run every i-th of n candidates once, which leaves it in Triton's cache."""
    index, count = map(int, share.split("/"))
    tokens, n, channels = data.streams.shape
    base = default_tiles(n, tokens, channels, data.streams.dtype)
    for kernel, tiles in variants(kernels, base)[index::count]:
        try:
            calls(kernel, [data], tiles)[0]()
            torch.cuda.synchronize()
        except Exception as error:  # reported where it is timed
            print(f"{kernel}: {type(error).__name__}", file=sys.stderr)


def tune(shape: str, kernels: list[str], workers: int, repetitions: int) -> Tiles:
    tokens, channels, n = map(int, shape.split(","))
    command = [sys.executable, __file__, "--shapes", shape, "--kernels", *kernels, "--compile"]
    running = [subprocess.Popen([*command, f"{i}/{workers}"]) for i in range(workers)]
    for process in running:
        process.wait()
    data = [random_operands(tokens, n, channels, torch.bfloat16, seed) for seed in range(COPIES)]
    base = best = default_tiles(n, tokens, channels, torch.bfloat16)
    for kernel in kernels:
        if not candidates(kernel, base):
            continue
        timed = []
        for name, tiles in variants([kernel], base):
            microseconds = time_of(name, data, tiles, repetitions)
            if microseconds is not None:
                timed.append((microseconds, tiles))
        timed.sort(key=lambda item: item[0])
        standard = time_of(kernel, data, base, repetitions)
        print(f"{shape} {kernel}: default {standard} us")
        for microseconds, tiles in timed[:6]:
            of_split = SPLITS.get(kernel, "weight_split")
            extra = f"terms={tiles.product_terms} split={getattr(tiles, of_split)}"
            print(f"  {microseconds:8.1f} us  {getattr(tiles, kernel)} {extra}")
        exact = [tiles for _, tiles in timed if tiles.product_terms == base.product_terms]
        if exact:
            chosen = exact[0]
            best = replace(best, **{kernel: getattr(chosen, kernel)})
            if kernel in SPLITS:
                best = replace(best, **{SPLITS[kernel]: getattr(chosen, SPLITS[kernel])})
    print(f"{shape} best: {best}", flush=True)
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", required=True, help="T,C,n")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--workers", type=int, default=8, help="processes that compile")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--write", type=Path, help="the best of the last shape, for kernels.py")
    parser.add_argument("--compile", metavar="I/N", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for shape in args.shapes:
        if args.compile is not None:
            tokens, channels, n = map(int, shape.split(","))
            data = random_operands(tokens, n, channels, torch.bfloat16, 0)
            compile_share(args.compile, args.kernels, data)
        else:
            best = tune(shape, args.kernels, args.workers, args.repetitions)
            if args.write is not None:
                num_streams = int(shape.split(",")[2])
                found = {"num_streams": num_streams, "tiles": asdict(best)}
                args.write.write_text(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
