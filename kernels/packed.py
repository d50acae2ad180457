"""The mappings of a sublayer in one tensor, as the kernels write and read them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mhc_megatron.kernels.reference import Mappings


# Made at every call: a frozen one costs the host several times as much.
@dataclass(eq=False, slots=True)
class PackedMappings:
    """``Mappings`` of T = prod(tokens) tokens as rows of one float32 tensor, tokens last.

    Has the attributes of ``Mappings``, as views.

    Attributes:
        packed: [n * (n + 2), T]: H_pre, H_post, then H_res row-major in ``res[o, i]``.
        num_streams: n.
        tokens: the token dimensions of the streams.
        source: the streams that ``pre`` read, and
        through: the same numbers as an output of ``pre``. ``post`` of ``source`` mixes ``through``,
            so that its gradient reaches the backward of ``pre``, which adds its own in passing:
            autograd would write both and add them in a kernel of its own. None after ``post_pre``.
        inverse_rms: 1/RMS of the branch's input, [T] float32, where it was normalised; with it
            ``rebuild`` normalises again.
    """

    packed: Tensor
    num_streams: int
    tokens: torch.Size
    source: Tensor | None = None
    through: Tensor | None = None
    inverse_rms: Tensor | None = None

    def streams_for_post(self, streams: Tensor) -> Tensor:
        """``through`` if ``streams`` are its ``source``."""
        return self.through if streams is self.source and self.through is not None else streams

    @property
    def pre(self) -> Tensor:
        """H_pre, [..., n]."""
        return self._rows(0, self.num_streams)

    @property
    def post(self) -> Tensor:
        """H_post, [..., n]."""
        return self._rows(self.num_streams, 2 * self.num_streams)

    @property
    def res(self) -> Tensor:
        """H_res, [..., n, n]."""
        n = self.num_streams
        return self._rows(2 * n, n * (n + 2)).unflatten(-1, (n, n))

    def _rows(self, start: int, stop: int) -> Tensor:
        return self.packed[start:stop].t().reshape(*self.tokens, stop - start)


def pack(mix: Mappings | PackedMappings) -> Tensor:
    """[n * (n + 2), T] of either form; differentiable."""
    if isinstance(mix, PackedMappings):
        return mix.packed
    n = mix.pre.shape[-1]
    rows = torch.cat([mix.pre, mix.post, mix.res.flatten(-2)], dim=-1)
    return rows.reshape(-1, n * (n + 2)).t().contiguous()
