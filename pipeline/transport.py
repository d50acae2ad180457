"""How messages travel between the ranks of a pipeline."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mhc_megatron.pipeline.actions import Transfer


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """What every activation and gradient between stages looks like.

    Attributes:
        shape: [s, b, n*C] for hyper-connected models, with s the local shard.
        dtype: of the elements.
        device: where it is received.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class TransferError(RuntimeError):
    """A message that did not arrive: why, without the rank and action that the executor adds."""


class Receipt(Protocol):
    """A posted receive."""

    def wait(self) -> Tensor:
        """The message; work that is enqueued afterwards sees its contents.

        Raises:
            TransferError: it did not come in time.
        """
        ...


class Transport(Protocol):
    """First in, first out per directed edge between two ranks.

    Attributes:
        rank: this rank of the pipeline.
    """

    rank: int

    def send(self, transfer: Transfer, tensor: Tensor) -> None:
        """Start to send; the tensor stays alive until it has gone and must not be changed."""
        ...

    def receive(self, transfer: Transfer, message: Message) -> Receipt:
        """Post a receive. Those of one peer are answered in the order in which they are posted."""
        ...

    def finish(self) -> None:
        """Wait until everything that was sent has gone.

        Raises:
            TransferError: it did not go in time.
        """
        ...
