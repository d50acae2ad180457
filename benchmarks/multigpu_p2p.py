"""Bandwidth of messages between two ranks: ours, and plain batched sends and receives.

A message is bf16 [4096, 1, n*C], what a stage of an mHC model passes on; in FP8 it is packed before
and unpacked after, which its bandwidth, of the bytes in bf16, includes. Alone: rank 0 sends to
rank 1. Both: each sends to the other at once, and the figure is that of one direction.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor

from mhc_megatron.launch.environment import World
from mhc_megatron.message_blocks import MessageBlocks
from mhc_megatron.pipeline.actions import Compute, Op, Transfer
from mhc_megatron.pipeline.catalogue import generate
from mhc_megatron.pipeline.distributed import DistributedTransport
from mhc_megatron.pipeline.fp8_transport import FP8Transport
from mhc_megatron.pipeline.transport import Message, Receipt, Transport
from mhc_megatron.training.config import ParallelConfig, TrainConfig
from mhc_megatron.training.runtime import distributed_runtime

CHANNELS, NUM_STREAMS, SEQ = (1280, 2560, 4096), 4, 4096
MESSAGES, REPETITIONS = 20, 7  # in a row; the first repetition warms up
AHEAD = 2  # receives that are posted before they are needed
SECONDS = 55.0  # the first messages wait for communicators and the compiler


def seconds_per_message(
    rank: int, world_size: int, widths: list[int], seq: int
) -> dict[tuple[str, int, bool], list[float]]:
    """A job of two ranks: by (implementation, width, both directions), one per repetition."""
    config = TrainConfig(
        parallel=ParallelConfig(pipeline=2),
        micro_batch_size=1,
        global_batch_size=1,
        timeout_minutes=SECONDS / 60,
    )
    found = {}
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
        transport = DistributedTransport(
            generate("one_f_one_b", num_ranks=2, num_mb=1), range(2), device=device
        )
        packed = FP8Transport(transport, MessageBlocks())
        for width in widths:
            _load_codec((seq, 1, width), device)
            for both in (False, True):
                for name, exchange in (
                    ("mhc_megatron", lambda *a: _transported(transport, *a)),
                    ("mhc_megatron.fp8", lambda *a: _transported(packed, *a)),
                    ("batch_isend_irecv", _batched),
                ):
                    found[name, width, both] = _measure(rank, width, seq, both, device, exchange)
    return found


def _load_codec(shape: tuple[int, ...], device: torch.device) -> None:
    """Run its kernels: to load them the GPU would wait for receives that are posted ahead."""
    tensor, codec = torch.ones(shape, dtype=torch.bfloat16, device=device), MessageBlocks()
    codec.unpack(codec.pack(tensor), shape, tensor.dtype)


Exchange = Callable[[int, Tensor, Message, bool], None]


def _measure(
    rank: int, width: int, seq: int, both: bool, device: torch.device, exchange: Exchange
) -> list[float]:
    message = Message(shape=(seq, 1, width), dtype=torch.bfloat16, device=device)
    tensor = torch.full(message.shape, float(rank), dtype=message.dtype, device=device)
    times = []
    for _ in range(REPETITIONS + 1):
        dist.barrier()
        _synchronize(device)
        start = time.perf_counter()
        exchange(rank, tensor, message, both)
        _synchronize(device)
        times.append((time.perf_counter() - start) / MESSAGES)
    return times[1:]


def _transported(
    transport: Transport, rank: int, tensor: Tensor, message: Message, both: bool
) -> None:
    peer = 1 - rank
    sends, receives = both or rank == 0, both or rank == 1
    posted: deque[Receipt] = deque()

    def post() -> None:
        posted.append(transport.receive(Transfer("recv", Compute(Op.F, peer, 0), peer), message))

    for _ in range(AHEAD if receives else 0):
        post()
    for index in range(MESSAGES):
        if sends:
            transport.send(Transfer("send", Compute(Op.F, rank, 0), peer), tensor)
        if receives:
            posted.popleft().wait()
            if index + AHEAD < MESSAGES:
                post()
    transport.finish()


def _batched(rank: int, tensor: Tensor, message: Message, both: bool) -> None:
    peer = 1 - rank
    for _ in range(MESSAGES):
        operations = []
        if both or rank == 0:
            operations.append(dist.P2POp(dist.isend, tensor, peer))
        if both or rank == 1:
            received = torch.empty(message.shape, dtype=message.dtype, device=message.device)
            operations.append(dist.P2POp(dist.irecv, received, peer))
        for work in dist.batch_isend_irecv(operations):
            work.wait()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def p2p_lines(ranks: Ranks, *, hidden: int | None, seq: int | None) -> Iterator[dict[str, Any]]:
    """Result lines without provenance."""
    length = seq or SEQ
    channels = CHANNELS if hidden is None else (hidden,)
    widths = [NUM_STREAMS * width for width in channels]
    by_rank = ranks.run(seconds_per_message, 2, widths, length, seconds=SECONDS)
    for (name, width, both), times in by_rank[1].items():  # it receives
        if both:
            times = [max(pair) for pair in zip(times, by_rank[0][name, width, both], strict=True)]
        num_bytes = 2 * width * length
        rates = [num_bytes / seconds / 1e9 for seconds in times]
        yield {
            "impl": name,
            "shape": {
                "T": length,
                "C": width // NUM_STREAMS,
                "n": NUM_STREAMS,
                "directions": 2 if both else 1,
                "dtype": "bfloat16",
            },
            "metric": "p2p_bandwidth",
            "value": statistics.median(rates),
            "unit": "GB/s",
            "spread": [min(rates), max(rates)],
        }
