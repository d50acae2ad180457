"""Messages in eight bits over any transport: half the bytes of bfloat16, and a rounding per hop."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mhc_megatron.pipeline.actions import Transfer
from mhc_megatron.pipeline.fp8_size import packed_size
from mhc_megatron.pipeline.transport import Message, Receipt, Transport


class Codec(Protocol):
    """Tensors in ``packed_size`` bytes and back, as ``kernels.fp8_blocks`` with blocks of 128."""

    def pack(self, tensor: Tensor) -> Tensor:
        """uint8 [``packed_size``]."""

    def unpack(self, packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The tensor, rounded."""


class FP8Transport:
    """Packs what is sent and unpacks what arrives; both ends of a pipeline need it.

    Packing and unpacking run on the streams on which the message is sent and waited for. The
    streams of a state are not rounded between stages of one rank.

    Args:
        transport: carries the packed messages.
        codec: packs and unpacks them.
    """

    def __init__(self, transport: Transport, codec: Codec) -> None:
        self._transport, self._codec = transport, codec
        self.rank = transport.rank

    def send(self, transfer: Transfer, tensor: Tensor) -> None:
        """As in ``Transport``."""
        self._transport.send(transfer, self._codec.pack(tensor))

    def receive(self, transfer: Transfer, message: Message) -> "FP8Receipt":
        """As in ``Transport``.

        Raises:
            ValueError: the message is not whole blocks of 128 along its last dimension.
        """
        shape = (packed_size(message.shape),)
        packed = Message(shape=shape, dtype=torch.uint8, device=message.device)
        return FP8Receipt(self._transport.receive(transfer, packed), message, self._codec)

    def finish(self) -> None:
        """As in ``Transport``."""
        self._transport.finish()


@dataclass(frozen=True)
class FP8Receipt:
    """See ``Receipt``."""

    receipt: Receipt
    message: Message
    codec: Codec

    def wait(self) -> Tensor:
        """The message, unpacked."""
        return self.codec.unpack(self.receipt.wait(), self.message.shape, self.message.dtype)
