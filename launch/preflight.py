"""``mhc-megatron preflight``: whether every node of a job is fit to train. Judgement is pure."""

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mhc_megatron.launch.environment import World, world_from_environment
from mhc_megatron.launch.gpus import POWER_CAP, Gpu

_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one rank found on its node.

    Attributes:
        rank, local_rank: of the whole job, and on its node.
        host: the node's name.
        clock_offset: its clock minus rank 0's, seconds; includes the way of a message.
        free_bytes: of the file system for checkpoints, as this node sees it.
        product_is_right: a product of two matrices had the only possible result.
        product_seconds: for it, the median of a few.
        node_bandwidth, job_bandwidth: of an all-reduce over this node's ranks and over all, as the
            bus of each rank sees it, GB/s; None over one rank.
        gpu: this rank's, by NVML; None on a CPU, or where NVML does not answer.
        gpu_used_bytes: memory of the GPU that is taken before the run; None on a CPU.
    """

    rank: int
    local_rank: int
    host: str
    clock_offset: float
    free_bytes: int
    product_is_right: bool
    product_seconds: float
    node_bandwidth: float | None = None
    job_bandwidth: float | None = None
    gpu: Gpu | None = None
    gpu_used_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is still good; None for no limit.

    Attributes:
        min_node_bandwidth, min_job_bandwidth: GB/s.
        max_clock_skew: seconds.
        min_free_gb: for checkpoints.
        max_gpu_used_gb: memory that others may hold on a GPU.
        max_slowdown: a GPU's product against the median of all ranks.
    """

    min_node_bandwidth: float | None = None
    min_job_bandwidth: float | None = None
    max_clock_skew: float = 1.0
    min_free_gb: float = 5.0
    max_gpu_used_gb: float = 2.0
    max_slowdown: float = 1.5


def bad_nodes(found: Sequence[Measurement], limits: Limits) -> dict[str, list[str]]:
    """Why nodes are not fit, by host; empty if all are."""
    typical = statistics.median(one.product_seconds for one in found)
    bad: dict[str, list[str]] = {}
    for one in sorted(found, key=lambda one: one.rank):
        reasons = list(_gpu_problems(one, limits, typical))
        if one.local_rank == 0:  # the same on all ranks of a node
            reasons += _node_problems(one, limits)
        if reasons:
            bad.setdefault(one.host, []).extend(reasons)
    return bad


def job_problem(found: Sequence[Measurement], limits: Limits) -> str | None:
    """What is wrong between the nodes; no single one can be named for it."""
    measured = found[0].job_bandwidth
    if _below(measured, limits.min_job_bandwidth):
        return (
            f"an all-reduce over {len(found)} ranks reaches {measured:.3g} GB/s, below "
            f"--min-job-bandwidth {limits.min_job_bandwidth:g}; look at the network, or lower it"
        )
    return None


def report(found: Sequence[Measurement], limits: Limits) -> list[str]:
    """One line for every bad node, and one for the network; empty if all is well."""
    lines = [
        f"node {host}: {'; '.join(reasons)} (leave it out with --exclude {host})"
        for host, reasons in bad_nodes(found, limits).items()
    ]
    between = job_problem(found, limits)
    return lines if between is None else [*lines, between]


def _gpu_problems(one: Measurement, limits: Limits, typical: float) -> Iterator[str]:
    name = f"GPU {one.local_rank}" if one.gpu_used_bytes is not None else f"rank {one.rank}"
    if not one.product_is_right:
        yield f"{name} multiplies wrongly"
    if one.gpu_used_bytes is None:
        return  # the speed of a CPU depends on what else runs on it
    if one.product_seconds > limits.max_slowdown * typical:
        yield f"{name} multiplies {one.product_seconds / typical:.1f} x slower than the others"
    if one.gpu_used_bytes > limits.max_gpu_used_gb * _GB:
        yield f"{name} has {one.gpu_used_bytes / _GB:.1f} GB taken by something else"
    if one.gpu is None:
        return
    if one.gpu.ecc_errors:
        yield f"{name} has {one.gpu.ecc_errors} uncorrected ECC errors"
    held = [reason for reason in one.gpu.throttling if reason != POWER_CAP]
    if held:
        yield f"{name} is held down by {' and '.join(held)}"
    # A GPU that is alone uses none.
    if one.gpu.links_up < one.gpu.links and one.node_bandwidth is not None:
        yield f"{name} has {one.gpu.links_up} of {one.gpu.links} NVLinks"


def _node_problems(one: Measurement, limits: Limits) -> Iterator[str]:
    if abs(one.clock_offset) > limits.max_clock_skew:
        side = "ahead of" if one.clock_offset > 0 else "behind"
        yield f"its clock is {abs(one.clock_offset):.1f} s {side} rank 0's"
    if one.free_bytes < limits.min_free_gb * _GB:
        yield (
            f"{one.free_bytes / _GB:.1f} GB free for checkpoints, below --min-free-gb "
            f"{limits.min_free_gb:g}"
        )
    if _below(one.node_bandwidth, limits.min_node_bandwidth):
        yield (
            f"an all-reduce inside it reaches {one.node_bandwidth:.3g} GB/s, below "
            f"--min-node-bandwidth {limits.min_node_bandwidth:g}"
        )


def _below(measured: float | None, limit: float | None) -> bool:
    return measured is not None and limit is not None and measured < limit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mhc-megatron preflight``."""
    defaults = Limits()
    parser.add_argument("--out", type=Path, required=True, help="run directory: free disk is there")
    for name, what in (
        ("min_node_bandwidth", "of an all-reduce over the ranks of a node, GB/s"),
        ("min_job_bandwidth", "of an all-reduce over all ranks, GB/s"),
        ("max_clock_skew", "between a node's clock and rank 0's, seconds"),
        ("min_free_gb", "of the run directory's file system"),
        ("max_gpu_used_gb", "of a GPU's memory taken before the run"),
        ("max_slowdown", "of a GPU's matrix product against the median"),
    ):
        value = getattr(defaults, name)
        shown = "none" if value is None else f"{value:g}"
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
        return lines

    return 1 if measure_all(args.out, world, judge, minutes=args.timeout_minutes) else 0


def _well(found: Sequence[Measurement]) -> str:
    hosts = {one.host for one in found}
    first = found[0]
    speeds = [
        f"all-reduce {where} {speed:.3g} GB/s"
        for where, speed in (("in a node", first.node_bandwidth), ("of all", first.job_bandwidth))
        if speed is not None
    ]
    return ", ".join([f"fit: {len(found)} rank(s) on {len(hosts)} node(s)", *speeds])
