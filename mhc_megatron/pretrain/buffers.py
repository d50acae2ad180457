"""The order of gradient buffers in which the distributed optimizer's checkpoint is right."""

import torch
from megatron.core.distributed import DistributedDataParallel


def float32_buffers_first(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Put every chunk's float32 buffers before the others: a ``post_wrap_hook``.

    The distributed optimizer (core 0.19) holds a group's float32 parameters before the others, but
    numbers them in the buffers' order, and saves and loads states by that number. A half-precision
    model with float32 hyper-connections has groups of both dtypes; in this order the two agree.

    Args:
        chunks: this rank's model chunks as Megatron wrapped them.

    Returns:
        The same chunks. With more than one the orders cannot agree: see ``rejected.py``.
    """
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel):
            chunk.buffers.sort(key=lambda buffer: buffer.param_dtype != torch.float32)
    return chunks
