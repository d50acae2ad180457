"""Calls that were checked before: what was right of their sizes and dtypes is not asked again.

A host that launches kernels of microseconds has no time to look at ten tensors from all sides.
"""

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mhc_megatron.kernels import checks
from mhc_megatron.kernels.options import MappingOptions

Signature = tuple[Any, ...]
Found = TypeVar("Found")

# More than the numbers of tokens that a program sees.
_LIMIT = 4096


class Known(Generic[Found]):
    """What was found for each signature; all is forgotten where there are too many."""

    def __init__(self) -> None:
        self._found: dict[Signature | None, Found] = {}
        # Bound once; None, which nothing is remembered of, gives None.
        self.get = self._found.get

    def remember(self, signature: Signature | None, found: Found) -> None:
        """Later calls of this signature ``get`` what was found; of None none does."""
        if signature is None:
            return
        if len(self._found) >= _LIMIT:
            self._found.clear()
        self._found[signature] = found


def signature_of(
    tensors: Sequence[Tensor | None], options: MappingOptions | None, *others: Any
) -> Signature | None:
    """All that the checks and the choice of a backend look at, hashable; None of a call that has to
    be looked at each time: traced, or inside ``finite_inputs``.

    Args:
        tensors: of the call, the streams first.
        options: of the mappings.
        others: what else was given.
    """
    streams = tensors[0]
    assert streams is not None
    if not checks.may_be_known(streams):
        return None
    return (
        *[
            tensor
            if tensor is None
            else (tensor.shape, tensor.dtype, tensor.device, tensor.is_contiguous())
            for tensor in tensors
        ],
        # Whose kernels can be launched on the current device alone.
        torch._C._cuda_getDevice() if streams.is_cuda else None,
        options and (options.projection, options.iterations, options.eps, options.rms_eps),
        *others,
    )
