"""Several ranks of a pipeline in one process: a thread each, and on a GPU a stream each.

What a pipeline of P processes does to its data is then really done, in the same order, on one
device: with CUDA, streams and events are those of P ranks.
"""

import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from mhc_megatron.pipeline.actions import Transfer
from mhc_megatron.pipeline.transport import Message, TransferError

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class _Sent:
    """A message on its way; without a transfer, the news that the sender has failed."""

    transfer: Transfer | None
    tensor: Tensor | None = None
    ready: Any = None  # torch.cuda.Event


@dataclass(kw_only=True)
class Exchange:
    """The queues that the ranks of one process share.

    Attributes:
        num_ranks: ranks of the pipeline.
        timeout: seconds that a receive waits.
    """

    num_ranks: int
    timeout: float = 60.0
    queues: dict[tuple[int, int], "queue.SimpleQueue[_Sent]"] = field(init=False)

    def __post_init__(self) -> None:
        ranks = range(self.num_ranks)
        self.queues = {(a, b): queue.SimpleQueue() for a in ranks for b in ranks}

    def fail(self, rank: int) -> None:
        """Let nobody wait for ``rank`` any longer."""
        for peer in range(self.num_ranks):
            self.queues[rank, peer].put(_Sent(None))


class InProcessTransport:
    """One rank's end of an Exchange.

    Args:
        exchange: shared by all ranks.
        rank: this one.
    """

    def __init__(self, exchange: Exchange, rank: int) -> None:
        self.exchange, self.rank = exchange, rank

    def send(self, transfer: Transfer, tensor: Tensor) -> None:
        """Hand over the tensor itself, with an event after the work that makes it."""
        ready = None
        if tensor.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        self.exchange.queues[self.rank, transfer.peer].put(_Sent(transfer, tensor, ready))

    def receive(self, transfer: Transfer, message: Message) -> "InProcessReceipt":
        """Nothing has to be posted: the sender's memory is the receiver's."""
        return InProcessReceipt(self, transfer, message)

    def finish(self) -> None:
        """Messages have gone as soon as they are sent."""


@dataclass(frozen=True)
class InProcessReceipt:
    """See ``Receipt``."""

    transport: InProcessTransport
    transfer: Transfer
    message: Message

    def wait(self) -> Tensor:
        """The next message of the peer; the current stream waits for it."""
        exchange, peer = self.transport.exchange, self.transfer.peer
        try:
            sent = exchange.queues[peer, self.transport.rank].get(timeout=exchange.timeout)
        except queue.Empty:
            raise TransferError(f"nothing arrived within {exchange.timeout:g} s") from None
        if sent.transfer is None or sent.tensor is None:
            raise TransferError(f"rank {peer} has failed")
        assert sent.transfer.of == self.transfer.of, f"{sent.transfer} instead of {self.transfer}"
        assert tuple(sent.tensor.shape) == self.message.shape, sent.tensor.shape
        if sent.ready is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(sent.ready)
            sent.tensor.record_stream(stream)
        return sent.tensor


def run_ranks(
    function: Callable[[InProcessTransport], _Result],
    num_ranks: int,
    *,
    timeout: float = 60.0,
    device: torch.device | None = None,
) -> list[_Result]:
    """Call ``function`` for every rank at once and return their results.

    Args:
        function: one rank's work, for example an ``execute``.
        num_ranks: ranks of the pipeline.
        timeout: seconds that a receive waits.
        device: a GPU on which every rank gets a stream of its own; None for the CPU. The streams
            start after the work that is enqueued on the caller's, which waits for them at the end.

    Raises:
        The error of the lowest rank that failed by itself.
    """
    exchange = Exchange(num_ranks=num_ranks, timeout=timeout)
    results: list[Any] = [None] * num_ranks
    errors: dict[int, BaseException] = {}
    first: list[int] = []
    caller = torch.cuda.current_stream(device) if device is not None else None
    streams = [torch.cuda.Stream(device) if device is not None else None for _ in range(num_ranks)]

    def run(rank: int) -> None:
        stream = streams[rank]
        try:
            with contextlib.ExitStack() as stack:
                if stream is not None and caller is not None:
                    stream.wait_stream(caller)
                    stack.enter_context(torch.cuda.stream(stream))
                results[rank] = function(InProcessTransport(exchange, rank))
        except BaseException as error:
            first.append(rank)
            errors[rank] = error
            exchange.fail(rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for stream in streams:
        if stream is not None and caller is not None:
            caller.wait_stream(stream)
    if errors:
        raise errors[first[0]]
    return results
