"""What ``mhc-megatron preflight`` measures, by all ranks of a job together."""

import dataclasses
import pickle
import shutil
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mhc_megatron.launch.environment import World, node_name
from mhc_megatron.launch.gpus import read_gpus
from mhc_megatron.launch.judge_nodes import Measurement
from mhc_megatron.launch.machine import load_nvml

_Result = TypeVar("_Result")
_Value = TypeVar("_Value")
_ROUNDS = 5
# Elements of a message, and rows of a square matrix: some milliseconds on a GPU, and on a core.
_MESSAGE = {"cuda": 2**26, "cpu": 2**18}
_ROWS = {"cuda": 8192, "cpu": 256}


def measure_all(
    out: Path, world: World, judge: Callable[[list[Measurement]], _Result], *, minutes: float
) -> _Result:
    """Measure every rank and let each judge all of them.

    First each rank by itself; if one fails there, as on a GPU that is lost, nothing is measured
    between them, where the others would wait for it.

    Args:
        out: the run directory, or one that will be made below an existing folder.
        world: this process among the job's.
        judge: called on every rank with the measurements of all, by rank.
        minutes: until a rank that does not answer is an error.

    Returns:
        What ``judge`` returned. All ranks return together: whoever prints has printed by then.
    """
    timeout = timedelta(minutes=minutes)
    store: dist.Store = dist.HashStore()
    if world.world_size > 1:
        meeting = dist.rendezvous("env://", world.rank, world.world_size, timeout=timeout)
        store = next(iter(meeting))[0]
        store.set_timeout(timeout)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", world.local_rank) if on_gpu else torch.device("cpu")
    mine = _alone(out, world, device)
    found = _all_of(store, world, "alone", mine)
    if all(one.failure is None for one in found):
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.world_size,
            timeout=timeout,
        )
        try:
            mine = _together(mine, device, [one.host for one in found])
        finally:
            dist.destroy_process_group()
        found = _all_of(store, world, "together", mine)
    result = judge(found)
    _all_of(store, world, "judged", None)
    return result


def _all_of(store: dist.Store, world: World, name: str, mine: _Value) -> list[_Value]:
    """What every rank gives, by rank; the store's rank leaves when all have read it."""
    store.set(f"{name}/{world.rank}", _packed(mine))
    if world.rank == 0:
        every = [_unpacked(store.get(f"{name}/{rank}")) for rank in range(world.world_size)]
        store.set(f"{name}/all", _packed(every))
        store.wait([f"{name}/read/{rank}" for rank in range(1, world.world_size)])
        return every
    every = _unpacked(store.get(f"{name}/all"))
    store.set(f"{name}/read/{world.rank}", "")
    return every


def _packed(value: object) -> str:
    return pickle.dumps(value).hex()  # a store takes text


def _unpacked(text: bytes) -> Any:
    return pickle.loads(bytes.fromhex(text.decode()))


def _alone(out: Path, world: World, device: torch.device) -> Measurement:
    """What a rank finds without the others, or what kept it from that."""
    found = Measurement(
        rank=world.rank,
        local_rank=world.local_rank,
        host=node_name(),
        free_bytes=shutil.disk_usage(_existing(out)).free,
    )
    try:
        used = name = gpu = None
        if device.type == "cuda":
            torch.cuda.set_device(device)
            # Before this process takes memory itself, but for its context.
            free, total = torch.cuda.mem_get_info()
            used, name = total - free, torch.cuda.get_device_name()
            devices = read_gpus(load_nvml()).devices
            # NVML numbers the GPUs of the machine: the same only where the job has all of them.
            if len(devices) == torch.cuda.device_count():
                gpu = devices[world.local_rank]
        tflops, is_right = _product(device)
    except RuntimeError as error:  # CUDA's are of this class
        return dataclasses.replace(found, failure=" ".join(str(error).split("\n")[0].split()))
    return dataclasses.replace(
        found,
        product_is_right=is_right,
        product_tflops=tflops,
        gpu_name=name,
        gpu=gpu,
        gpu_used_bytes=used,
    )


def _together(mine: Measurement, device: torch.device, hosts: list[str]) -> Measurement:
    # Every rank makes every group, in one order.
    groups = {
        name: dist.new_group([rank for rank, other in enumerate(hosts) if other == name])
        for name in sorted(set(hosts))
    }
    return dataclasses.replace(
        mine,
        clock_offset=_clock_offset(device),
        node_bandwidth=_bandwidth(device, groups[mine.host], hosts.count(mine.host)),
        job_bandwidth=_bandwidth(device, None, len(hosts)),
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
    """TFLOP/s of a matrix product, and whether its result is the only possible one."""
    rows = _ROWS[device.type]
    # Powers of two: every partial sum is exact, in any order.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left = torch.full((rows, rows), 0.5, dtype=dtype, device=device)
    right = torch.full((rows, rows), 2.0, dtype=dtype, device=device)
    times = [_timed(device, lambda: left @ right) for _ in range(1 + _ROUNDS)][1:]
    tflops = 2 * rows**3 / statistics.median(times) / 1e12
    return tflops, bool((left @ right == rows).all())


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
