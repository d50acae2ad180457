"""``mhc-megatron preflight``: whether every node of a job is fit to train."""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mhc_megatron.errors import UserError
from mhc_megatron.launch.environment import World, world_from_environment
from mhc_megatron.launch.judge_nodes import Limits, Measurement, not_judged, replaceable, report

_OF_THE_GPU = "the GPU's, where it is known"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mhc-megatron preflight``."""
    defaults = Limits()
    parser.add_argument("--out", type=Path, required=True, help="run directory: free disk is there")
    parser.add_argument(
        "--unfit",
        type=Path,
        metavar="FILE",
        help="write the nodes that other nodes should replace: a name, a tab and why, a line each",
    )
    for name, what in (
        ("min_matmul_tflops", "of a GPU's matrix product, TFLOP/s"),
        ("min_node_bandwidth", "of an all-reduce over the ranks of a node, GB/s"),
        ("min_job_bandwidth", "of an all-reduce over all ranks, GB/s"),
        ("max_clock_skew", "between a node's clock and rank 0's, seconds"),
        ("min_free_gb", "of the run directory's file system"),
        ("max_gpu_used_gb", "of a GPU's memory taken before the run"),
        ("max_slowdown", "of a GPU's matrix product against the median"),
    ):
        value = getattr(defaults, name)
        shown = _OF_THE_GPU if value is None else f"{value:g}"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=float,
            default=value,
            help=f"{what} (default: {shown})",
        )
    parser.add_argument(
        "--timeout-minutes",
        type=float,
        default=5.0,
        help="until a rank that does not answer is an error (default: 5)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure on every rank, judge on rank 0; 1 on all ranks if a node is bad."""
    from mhc_megatron.launch.measure_node import measure_all  # torch takes its seconds

    world = world_from_environment() or World(rank=0, local_rank=0, world_size=1)
    limits = Limits(**{name: getattr(args, name) for name in vars(Limits())})

    def judge(found: list[Measurement]) -> list[str]:
        lines = report(found, limits)
        if world.rank == 0:
            for line in lines:
                print(f"mhc-megatron preflight: {line}", file=sys.stderr, flush=True)
            if not lines:
                print(f"preflight: {_well(found)}", flush=True)
                if open_ends := not_judged(found, limits):
                    print(f"preflight: {open_ends}", flush=True)
            if args.unfit is not None:
                _write_unfit(args.unfit, replaceable(found, limits))
        return lines

    return 1 if measure_all(args.out, world, judge, minutes=args.timeout_minutes) else 0


def limit_flags(assignments: Sequence[str]) -> tuple[str, ...]:
    """Arguments of ``mhc-megatron preflight`` for limits as ``NAME=VALUE``.

    Raises:
        UserError: no such limit, or no number of 0 or more.
    """
    flags: list[str] = []
    for text in assignments:
        name, _, value = text.partition("=")
        name = name.replace("_", "-")
        known = [field.replace("_", "-") for field in vars(Limits())]
        if name not in known:
            raise UserError(f"--limits {text!r} is not NAME=VALUE of one of {', '.join(known)}")
        try:
            is_limit = 0 <= float(value) < math.inf
        except ValueError:
            is_limit = False
        if not is_limit:
            raise UserError(f"--limits {text!r}: a number of 0 or more is needed")
        flags += [f"--{name}", value]
    return tuple(flags)


def _write_unfit(file: Path, nodes: Mapping[str, Sequence[str]]) -> None:
    lines = [f"{host}\t{'; '.join(reasons)}\n" for host, reasons in nodes.items()]
    file.write_text("".join(lines))


def _well(found: Sequence[Measurement]) -> str:
    hosts = {one.host for one in found}
    first = found[0]
    speeds = [
        f"all-reduce {where} {speed:.3g} GB/s"
        for where, speed in (("in a node", first.node_bandwidth), ("of all", first.job_bandwidth))
        if speed is not None
    ]
    return ", ".join([f"fit: {len(found)} rank(s) on {len(hosts)} node(s)", *speeds])
