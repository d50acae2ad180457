"""Messages over torch.distributed: one communicator per directed edge, gloo or NCCL.

Two directions on one communicator would need sends and receives in one order on both sides, which
a pipeline does not have. With one per directed edge, first in, first out is enough.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from mhc_megatron.pipeline.actions import Transfer
from mhc_megatron.pipeline.dataflow import edges_of
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.transport import Message, TransferError

_POLL = 1e-4  # seconds
_SENDS_HELD = 4  # of a captured step


class DistributedTransport:
    """One rank's end of a pipeline's communicators. Made by all processes of the world together.

    Sends are asynchronous; a sent tensor is held with its work until that is complete (gloo says
    so only when it is waited for, which is at the end of the step). On NCCL a receive makes the
    current stream wait; the host waits for the message before it on the same edge, so that it is
    never more than one message per edge ahead, and a peer that is gone is noticed.

    While a CUDA graph is captured nothing moves, and only the stream waits: for a message, and for
    the oldest of more sends than a few, whose memory can then be used again. ``lower_rank`` says
    why every action may wait for what is under way. Nobody notices a peer that is gone when such a
    graph is replayed.

    Args:
        schedule: its placement says which ranks talk to each other.
        ranks: global rank of every rank of this process's pipeline; beside it the world may hold
            others with the same schedule.
        device: of the messages: CPU for gloo, this process's GPU for NCCL.
        timeout: until a message that does not arrive, or go, is an error.

    Raises:
        TransferError: a neighbour does not take part within ``timeout``.
    """

    def __init__(
        self,
        schedule: Schedule,
        ranks: Sequence[int],
        *,
        device: torch.device,
        timeout: timedelta = timedelta(minutes=10),
    ) -> None:
        self.rank = list(ranks).index(dist.get_rank())
        self.timeout = timeout
        self._ranks = list(ranks)
        self._sent: deque[tuple[Transfer, dist.Work, Tensor]] = deque()
        self._last: dict[int, DistributedReceipt] = {}
        self._edges: dict[tuple[int, int], dist.ProcessGroup] = {}
        pipelines = _pipelines(ranks)
        for source, target in edges_of(schedule):
            for pipeline in pipelines:
                pair = [pipeline[source], pipeline[target]]
                # NCCL's own watchdog ends a process without naming an action: ours comes first.
                group = dist.new_group(pair, timeout=2 * timeout, device_id=_connected(device))
                if dist.get_rank() in pair:
                    self._edges[source, target] = group
        for edge, group in self._edges.items():
            self._try(edge, group, device)

    def _try(self, edge: tuple[int, int], group: dist.ProcessGroup, device: torch.device) -> None:
        """Send one element over an edge, which connects its ends."""
        source, target = (self._ranks[end] for end in edge)
        element = torch.zeros(1, device=device)
        try:
            if edge[0] == self.rank:
                work = dist.isend(element, target, group=group)
            else:
                work = dist.irecv(element, source, group=group)
            _complete(work, element, self.timeout)
        except RuntimeError as error:
            raise TransferError(f"ranks {edge} of the pipeline cannot connect: {error}") from error

    def send(self, transfer: Transfer, tensor: Tensor) -> None:
        """As in ``Transport``."""
        if _capturing(tensor):
            while len(self._sent) >= _SENDS_HELD:
                self._sent.popleft()[1].wait()
        else:
            while self._sent and self._sent[0][1].is_completed():
                self._sent.popleft()
        tensor = tensor.contiguous()
        group = self._edges[self.rank, transfer.peer]
        try:
            work = dist.isend(tensor, self._ranks[transfer.peer], group=group)
        except RuntimeError as error:
            raise TransferError(str(error)) from error
        assert work is not None
        self._sent.append((transfer, work, tensor))

    def receive(self, transfer: Transfer, message: Message) -> "DistributedReceipt":
        """As in ``Transport``."""
        tensor = torch.empty(message.shape, dtype=message.dtype, device=message.device)
        group = self._edges[transfer.peer, self.rank]
        try:
            work = dist.irecv(tensor, self._ranks[transfer.peer], group=group)
        except RuntimeError as error:
            raise TransferError(str(error)) from error
        assert work is not None
        return DistributedReceipt(self, transfer.peer, work, tensor)

    def arrived(self, receipt: "DistributedReceipt") -> None:
        """Wait for a receipt as the class says."""
        if not receipt.tensor.is_cuda:
            _complete(receipt.work, receipt.tensor, self.timeout)
            return
        before = self._last.get(receipt.peer)
        if before is not None and not _capturing(receipt.tensor):
            _complete(before.work, before.tensor, self.timeout)
        self._last[receipt.peer] = receipt
        receipt.work.wait()

    def finish(self) -> None:
        """As in ``Transport``."""
        while self._sent:
            transfer, work, tensor = self._sent[0]
            try:
                _complete(work, tensor, self.timeout)
            except TransferError as error:
                raise TransferError(f"{transfer}: {error}") from error
            self._sent.popleft()
        for receipt in self._last.values():
            _complete(receipt.work, receipt.tensor, self.timeout)
        self._last.clear()


@dataclass(frozen=True)
class DistributedReceipt:
    """See ``Receipt``."""

    transport: DistributedTransport
    peer: int
    work: dist.Work
    tensor: Tensor

    def wait(self) -> Tensor:
        """The received tensor."""
        self.transport.arrived(self)
        return self.tensor


def _pipelines(ranks: Sequence[int]) -> list[list[int]]:
    """The ranks of all pipelines of the world, in one order for all."""
    found: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(found, list(ranks))
    return sorted({tuple(pipeline): pipeline for pipeline in found}.values())


def _connected(device: torch.device) -> torch.device | None:
    """With this device a group's communicator is made at once, for messages of all sizes."""
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else None


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _complete(work: dist.Work | None, tensor: Tensor, timeout: timedelta) -> None:
    """Wait on the host until a transfer is over."""
    assert work is not None
    try:
        if tensor.is_cuda and not _capturing(tensor):
            deadline = time.monotonic() + timeout.total_seconds()
            while not work.is_completed():
                if time.monotonic() > deadline:
                    raise TransferError(f"nothing moved within {timeout.total_seconds():g} s")
                time.sleep(_POLL)
        if tensor.is_cuda:
            work.wait()
        else:
            work.wait(timeout)
    except TransferError:
        raise
    except RuntimeError as error:
        raise TransferError(str(error).splitlines()[0]) from error
