"""Which nodes of a job are fit to train, from what their ranks have measured. Pure."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mhc_megatron.launch.floors import Floors, floors_of
from mhc_megatron.launch.gpus import POWER_CAP, Gpu

_GB = 1e9
_NODES_FOR_A_MEDIAN = 3  # of two clocks neither is the wrong one


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one rank found on its node.

    Attributes:
        rank, local_rank: of the whole job, and on its node.
        host: the node's name.
        free_bytes: of the file system for checkpoints, as this node sees it.
        failure: what kept this rank from measuring, one line; then the rest means nothing.
        clock_offset: its clock minus rank 0's, seconds; includes the way of a message.
        product_is_right: a product of two matrices had the only possible result.
        product_tflops: its speed, the median of a few, TFLOP/s.
        node_bandwidth, job_bandwidth: of an all-reduce over this node's ranks and over all, as the
            bus of each rank sees it, GB/s; None over one rank.
        gpu_name: CUDA's name of this rank's GPU; None on a CPU.
        gpu: the same, by NVML; None on a CPU, or where NVML does not answer.
        gpu_used_bytes: memory of the GPU that is taken before the run; None on a CPU.
    """

    rank: int
    local_rank: int
    host: str
    free_bytes: int
    failure: str | None = None
    clock_offset: float = 0.0
    product_is_right: bool = True
    product_tflops: float = 0.0
    node_bandwidth: float | None = None
    job_bandwidth: float | None = None
    gpu_name: str | None = None
    gpu: Gpu | None = None
    gpu_used_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is still good; a minimum of 0 is no limit.

    Attributes:
        min_matmul_tflops: of a GPU's matrix product, TFLOP/s; None for the GPU's own (``floors``).
        min_node_bandwidth: of an all-reduce inside a node, GB/s; None for the GPU's own.
        min_job_bandwidth: of one over all ranks, GB/s: what the network gives is the site's.
        max_clock_skew: seconds.
        min_free_gb: for checkpoints.
        max_gpu_used_gb: memory that others may hold on a GPU.
        max_slowdown: a GPU's product against the median of all ranks.
    """

    min_matmul_tflops: float | None = None
    min_node_bandwidth: float | None = None
    min_job_bandwidth: float = 0.0
    max_clock_skew: float = 1.0
    min_free_gb: float = 5.0
    max_gpu_used_gb: float = 2.0
    max_slowdown: float = 1.5


def bad_nodes(found: Sequence[Measurement], limits: Limits) -> dict[str, list[str]]:
    """Why nodes are not fit, by host; empty if all are."""
    whole = [one for one in found if one.failure is None]
    typical = statistics.median([one.product_tflops for one in whole] or [0.0])
    clocks = [one.clock_offset for one in whole if one.local_rank == 0]
    by_median = len(clocks) >= _NODES_FOR_A_MEDIAN
    clock = statistics.median(clocks) if by_median else 0.0
    bad: dict[str, list[str]] = {}
    for one in sorted(found, key=lambda one: one.rank):
        reasons = list(_gpu_problems(one, limits, typical))
        if one.local_rank == 0 and one.failure is None:  # the same on all ranks of a node
            reasons += _node_problems(one, limits)
            ahead = one.clock_offset - clock
            if abs(ahead) > limits.max_clock_skew:
                others = "the other nodes'" if by_median else "rank 0's"
                side = "ahead of" if ahead > 0 else "behind"
                reasons.append(f"its clock is {abs(ahead):.1f} s {side} {others}")
        if one.local_rank == 0 and _is_short(one, limits) and not _all_short(found, limits):
            reasons.append(
                f"{one.free_bytes / _GB:.1f} GB free for checkpoints, below --min-free-gb "
                f"{limits.min_free_gb:g}"
            )
        if reasons:
            bad.setdefault(one.host, []).extend(reasons)
    return bad


def job_problems(found: Sequence[Measurement], limits: Limits) -> list[str]:
    """What is wrong on all nodes or between them; no single one can be named for it."""
    problems = []
    measured = found[0].job_bandwidth
    if _below(measured, limits.min_job_bandwidth):
        problems.append(
            f"an all-reduce over {len(found)} ranks reaches {measured:.3g} GB/s, below "
            f"--min-job-bandwidth {limits.min_job_bandwidth:g}; look at the network, or lower it"
        )
    if _all_short(found, limits):
        most = max(one.free_bytes for one in found)
        problems.append(
            f"{most / _GB:.1f} GB free for checkpoints on every node, below --min-free-gb "
            f"{limits.min_free_gb:g}; make room in the run directory, or lower it"
        )
    return problems


def report(found: Sequence[Measurement], limits: Limits) -> list[str]:
    """One line for every bad node, and one for what is wrong with all; empty if all is well."""
    named = [
        f"node {host}: {'; '.join(reasons)} (leave it out with --exclude {host})"
        for host, reasons in bad_nodes(found, limits).items()
    ]
    return named + job_problems(found, limits)


def replaceable(found: Sequence[Measurement], limits: Limits) -> dict[str, list[str]]:
    """The bad nodes that a job may leave out by itself, and why they are bad.

    None if all nodes of a job of several are bad, or something is wrong with the job as a whole:
    then the cause is a common one, or a limit is wrong, and other nodes would not help.
    """
    bad, hosts = bad_nodes(found, limits), {one.host for one in found}
    is_common = job_problems(found, limits) or len(bad) == len(hosts) > 1
    return {} if is_common else bad


def not_judged(found: Sequence[Measurement], limits: Limits) -> str | None:
    """What was measured and has no floor, and the flags that set one; None if all is judged."""
    first = found[0]
    unknown = {one.gpu_name for one in found if one.gpu_name and floors_of(one.gpu_name) is None}
    kinds = f" of {', '.join(sorted(unknown))}" if unknown else ""
    open_ends = []
    if unknown and limits.min_matmul_tflops is None:
        open_ends.append(f"the matrix product{kinds} (--min-matmul-tflops)")
    has_none = limits.min_node_bandwidth is None and (unknown or first.gpu_name is None)
    if first.node_bandwidth is not None and has_none:
        open_ends.append(f"the all-reduce in a node{kinds} (--min-node-bandwidth)")
    if first.job_bandwidth is not None and not limits.min_job_bandwidth:
        open_ends.append("the all-reduce of all ranks (--min-job-bandwidth)")
    return f"no floor for {', '.join(open_ends)}" if open_ends else None


def _gpu_problems(one: Measurement, limits: Limits, typical: float) -> Iterator[str]:
    name = f"rank {one.rank}" if one.gpu_name is None else f"GPU {one.local_rank}"
    if one.failure is not None:
        yield f"{name} fails: {one.failure}"
        return
    if not one.product_is_right:
        yield f"{name} multiplies wrongly"
    if one.gpu_used_bytes is None:
        return  # the speed of a CPU depends on what else runs on it
    floor = _floors(one, limits).matmul_tflops
    if one.product_tflops * limits.max_slowdown < typical:
        yield f"{name} multiplies {typical / one.product_tflops:.1f} x slower than the others"
    elif one.product_tflops < floor:
        yield (
            f"{name} multiplies with {one.product_tflops:.3g} TFLOP/s, below --min-matmul-tflops "
            f"{floor:g}"
        )
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
    floor = _floors(one, limits).node_bandwidth
    if _below(one.node_bandwidth, floor):
        yield (
            f"an all-reduce inside it reaches {one.node_bandwidth:.3g} GB/s, below "
            f"--min-node-bandwidth {floor:g}"
        )


def _floors(one: Measurement, limits: Limits) -> Floors:
    """The limits that are set, else those of the GPU's kind, else none (0)."""
    known = floors_of(one.gpu_name) or Floors(0.0, 0.0)
    matmul, bandwidth = limits.min_matmul_tflops, limits.min_node_bandwidth
    return Floors(
        known.matmul_tflops if matmul is None else matmul,
        known.node_bandwidth if bandwidth is None else bandwidth,
    )


def _below(measured: float | None, limit: float) -> bool:
    return measured is not None and measured < limit


def _is_short(one: Measurement, limits: Limits) -> bool:
    return one.free_bytes < limits.min_free_gb * _GB


def _all_short(found: Sequence[Measurement], limits: Limits) -> bool:
    """On a file system that all nodes share, that is."""
    return all(_is_short(one, limits) for one in found)
