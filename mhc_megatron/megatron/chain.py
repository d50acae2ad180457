"""The layers of a block as a chain: from one to the next in one pass over the streams.

Megatron's blocks hand hidden states from layer to layer. ``post`` of a layer's last branch and
``pre`` of the next layer's first read and write the same streams; done together, the streams cross
memory once less. What the next layer's ``pre`` made travels beside the hidden states.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor

from mhc_megatron.config import MHCConfig
from mhc_megatron.hyper_connection import Mix
from mhc_megatron.megatron.phased_tensor import TensorCollectives
from mhc_megatron.megatron.phases import PhaseMarker
from mhc_megatron.recompute import ForwardRecompute, StreamRecompute

if TYPE_CHECKING:
    from mhc_megatron.megatron.layer import MHCTransformerLayer


class LayerChain:
    """The layers of one built block.

    Attributes:
        recompute: what their forwards drop; None with ``recompute="none"``.
        marker: of the chunk's phases; None where nothing is interleaved.
        collectives: of tensor parallelism, which the layers do; None where branches do their own.
    """

    def __init__(self, recompute: StreamRecompute | None) -> None:
        self.layers: list[MHCTransformerLayer] = []
        self.recompute = recompute
        self.marker: PhaseMarker | None = None
        self.collectives: TensorCollectives | None = None
        self._handed: tuple[Tensor, Tensor, Mix] | None = None

    def after(self, layer: "MHCTransformerLayer") -> Optional["MHCTransformerLayer"]:
        """The next layer of the block; None for the last."""
        position = self.layers.index(layer) + 1
        return self.layers[position] if position < len(self.layers) else None

    def forward_recompute(self, layer: "MHCTransformerLayer") -> ForwardRecompute | None:
        """What drops the layer's states; None where there is no backward to rebuild them for."""
        if self.recompute is None or not torch.is_grad_enabled():
            return None
        if layer is not self.layers[0]:
            return self.recompute.current
        return self.recompute.begin(() if self.marker is None else self.marker.lanes.of_states)

    def begin(
        self,
        phase: str,
        *tensors: Tensor,
        past: Sequence[Tensor] = (),
        used: Sequence[Tensor | None] = (),
    ) -> tuple[Tensor, ...]:
        """``PhaseMarker.begin``; nothing without a marker."""
        if self.marker is None:
            return *tensors, *past
        return self.marker.begin(phase, *tensors, past=past, used=used)

    @property
    def ends_model(self) -> bool:
        """Whether a phase of the marker follows the layers."""
        return self.marker is not None and self.marker.phases[-1].layer is None

    def hand_over(self, streams: Tensor, branch_input: Tensor, mix: Mix) -> None:
        """Leave what the next layer's ``pre`` would make of exactly these streams."""
        self._handed = (streams, branch_input, mix)

    def take(self, streams: Tensor) -> tuple[Tensor, Mix] | None:
        """What was handed over with these streams; None if something came between."""
        handed, self._handed = self._handed, None
        if handed is None or handed[0] is not streams:
            return None
        return handed[1], handed[2]


def chain_of(chunk: torch.nn.Module) -> LayerChain | None:
    """The chain of a model chunk's layers; None with the plain residual."""
    for module in chunk.modules():
        chain = getattr(module, "chain", None)
        if isinstance(chain, LayerChain):
            return chain
    return None


class ChainBuilder:
    """In the params of a block's layer specs; every block built from them gets its own chain.

    Args:
        mhc: the hyper-connections' configuration.
        num_layers: of the block.

    Raises:
        UserError: the recompute policy does not fit a block of so many layers.
    """

    def __init__(self, mhc: MHCConfig, *, num_layers: int) -> None:
        self._mhc, self._num_layers = mhc, num_layers
        self._chain = self._new_chain()

    def join(self, layer: "MHCTransformerLayer", position: int) -> LayerChain:
        """Called by every layer when it is built, with its place in the block."""
        if position == 0:
            self._chain = self._new_chain()
        assert position == len(self._chain.layers), "a block builds its layers in order"
        self._chain.layers.append(layer)
        return self._chain

    def _new_chain(self) -> LayerChain:
        if self._mhc.recompute == "none":
            return LayerChain(None)
        return LayerChain(StreamRecompute(self._mhc, num_sublayers=2 * self._num_layers))
