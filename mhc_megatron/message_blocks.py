"""Pipeline messages in eight bits: the kernels' blocks, of the size that the pipeline counts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mhc_megatron.config import Backend
from mhc_megatron.kernels import fp8_blocks
from mhc_megatron.pipeline.fp8_size import BLOCK


@dataclass(frozen=True)
class MessageBlocks:
    """The codec of ``FP8Transport``.

    Attributes:
        backend: of the kernels.
    """

    backend: Backend = "auto"

    def pack(self, tensor: Tensor) -> Tensor:
        """As ``fp8_blocks.pack``, with ``pipeline.fp8_size``'s blocks."""
        return fp8_blocks.pack(tensor, block=BLOCK, backend=self.backend)

    def unpack(self, packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As ``fp8_blocks.unpack``."""
        return fp8_blocks.unpack(packed, shape, dtype, block=BLOCK, backend=self.backend)
