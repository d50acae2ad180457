"""Messages in eight bits over any transport: half the bytes of bfloat16, and a rounding per hop."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mhc_megatron.pipeline.actions import Transfer
from mhc_megatron.pipeline.fp8_blocks import pack, unpack
from mhc_megatron.pipeline.fp8_size import packed_size
from mhc_megatron.pipeline.transport import Message, Receipt, Transport


class FP8Transport:
    """Packs what is sent and unpacks what arrives; both ends of a pipeline need it.

    Packing and unpacking run on the streams on which the message is sent and waited for. The
    streams of a state are not rounded between stages of one rank.

    Args:
        transport: carries the packed messages.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.rank = transport.rank

    def send(self, transfer: Transfer, tensor: Tensor) -> None:
        """As in ``Transport``."""
        self._transport.send(transfer, pack(tensor))

    def receive(self, transfer: Transfer, message: Message) -> "FP8Receipt":
        """As in ``Transport``.

        Raises:
            ValueError: the message is not whole blocks of 128 along its last dimension.
        """
        shape = (packed_size(message.shape),)
        packed = Message(shape=shape, dtype=torch.uint8, device=message.device)
        return FP8Receipt(self._transport.receive(transfer, packed), message)

    def finish(self) -> None:
        """As in ``Transport``."""
        self._transport.finish()


@dataclass(frozen=True)
class FP8Receipt:
    """See ``Receipt``."""

    receipt: Receipt
    message: Message

    def wait(self) -> Tensor:
        """The message, unpacked."""
        return unpack(self.receipt.wait(), self.message.shape, self.message.dtype)
