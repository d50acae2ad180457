"""What ``mhc-megatron preflight`` measures, by all ranks of a job together."""

import shutil
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from mhc_megatron.launch.environment import World, node_name
from mhc_megatron.launch.gpus import read_gpus
from mhc_megatron.launch.machine import load_nvml
from mhc_megatron.launch.preflight import Measurement

_Result = TypeVar("_Result")
_ROUNDS = 5
# Elements of a message, and rows of a square matrix: some milliseconds on a GPU, and on a core.
_MESSAGE = {"cuda": 2**26, "cpu": 2**18}
_ROWS = {"cuda": 8192, "cpu": 256}


def measure_all(
    out: Path, world: World, judge: Callable[[list[Measurement]], _Result], *, minutes: float
) -> _Result:
    """Measure every rank and let each judge all of them.

    Args:
        out: the run directory, or one that will be made below an existing folder.
        world: this process among the job's.
        judge: called on every rank with the measurements of all, by rank.
        minutes: until a rank that does not answer is an error.

    Returns:
        What ``judge`` returned. All ranks return together: whoever prints has printed by then.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", world.local_rank) if on_gpu else torch.device("cpu")
    used = None
    if on_gpu:
        torch.cuda.set_device(device)
        # Before this process takes memory itself, but for its context.
        free, total = torch.cuda.mem_get_info()
        used = total - free
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        rank=world.rank,
        world_size=world.world_size,
        timeout=timedelta(minutes=minutes),
        store=dist.HashStore() if world.world_size == 1 else None,
    )
    try:
        mine = _measure(out, world, device, used)
        found: list[Measurement] = [mine] * world.world_size
        dist.all_gather_object(found, mine)
        result = judge(found)
        dist.barrier()
        return result
    finally:
        dist.destroy_process_group()


def _measure(out: Path, world: World, device: torch.device, used: int | None) -> Measurement:
    host = node_name()
    seconds, is_right = _product(device)
    hosts: list[str] = [host] * world.world_size
    dist.all_gather_object(hosts, host)
    # Every rank makes every group, in one order.
    groups = {
        name: dist.new_group([rank for rank, other in enumerate(hosts) if other == name])
        for name in sorted(set(hosts))
    }
    gpu = None
    if device.type == "cuda":
        devices = read_gpus(load_nvml()).devices
        # NVML numbers the GPUs of the machine: the same only where the job has all of them.
        if len(devices) == torch.cuda.device_count():
            gpu = devices[world.local_rank]
    return Measurement(
        rank=world.rank,
        local_rank=world.local_rank,
        host=host,
        clock_offset=_clock_offset(device),
        free_bytes=shutil.disk_usage(_existing(out)).free,
        product_is_right=is_right,
        product_seconds=seconds,
        node_bandwidth=_bandwidth(device, groups[host], hosts.count(host)),
        job_bandwidth=_bandwidth(device, None, world.world_size),
        gpu=gpu,
        gpu_used_bytes=used,
    )


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _clock_offset(device: torch.device) -> float:
    """This clock minus rank 0's: of a few messages the one that took least time."""
    offsets = []
    for _ in range(_ROUNDS):
        sent = torch.tensor([time.time()], dtype=torch.float64, device=device)
        dist.broadcast(sent, src=0)
        offsets.append(time.time() - sent.item() if dist.get_rank() else 0.0)
    return min(offsets, key=abs)


def _product(device: torch.device) -> tuple[float, bool]:
    """Seconds of a matrix product, and whether its result is the only possible one."""
    rows = _ROWS[device.type]
    # Powers of two: every partial sum is exact, in any order.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left = torch.full((rows, rows), 0.5, dtype=dtype, device=device)
    right = torch.full((rows, rows), 2.0, dtype=dtype, device=device)
    times = [_timed(device, lambda: left @ right) for _ in range(1 + _ROUNDS)][1:]
    return statistics.median(times), bool((left @ right == rows).all())


def _bandwidth(device: torch.device, group: dist.ProcessGroup | None, size: int) -> float | None:
    """GB/s that each rank's link carries in a ring all-reduce, 2 (n - 1) / n of the message."""
    if size == 1:
        return None
    message = torch.zeros(_MESSAGE[device.type], device=device)
    times = [
        _timed(device, lambda: dist.all_reduce(message, group=group)) for _ in range(1 + _ROUNDS)
    ]
    moved = 2 * (size - 1) / size * message.numel() * message.element_size()
    return moved / statistics.median(times[1:]) / 1e9


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
