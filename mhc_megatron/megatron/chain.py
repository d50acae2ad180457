"""The layers of a block as a chain: from one to the next in one pass over the streams.

Megatron's blocks hand hidden states from layer to layer. ``post`` of a layer's last branch and
``pre`` of the next layer's first read and write the same streams; done together, the streams cross
memory once less. What the next layer's ``pre`` made travels beside the hidden states.
"""

from typing import TYPE_CHECKING, Optional

from torch import Tensor

from mhc_megatron.hyper_connection import Mix

if TYPE_CHECKING:
    from mhc_megatron.megatron.layer import MHCTransformerLayer


class LayerChain:
    """The layers of one built block."""

    def __init__(self) -> None:
        self.layers: list[MHCTransformerLayer] = []
        self._handed: tuple[Tensor, Tensor, Mix] | None = None

    def after(self, layer: "MHCTransformerLayer") -> Optional["MHCTransformerLayer"]:
        """The next layer of the block; None for the last."""
        position = self.layers.index(layer) + 1
        return self.layers[position] if position < len(self.layers) else None

    def hand_over(self, streams: Tensor, branch_input: Tensor, mix: Mix) -> None:
        """Leave what the next layer's ``pre`` would make of exactly these streams."""
        self._handed = (streams, branch_input, mix)

    def take(self, streams: Tensor) -> tuple[Tensor, Mix] | None:
        """What was handed over with these streams; None if something came between."""
        handed, self._handed = self._handed, None
        if handed is None or handed[0] is not streams:
            return None
        return handed[1], handed[2]


class ChainBuilder:
    """In the params of a block's layer specs; every block built from them gets its own chain."""

    def __init__(self) -> None:
        self._chain = LayerChain()

    def join(self, layer: "MHCTransformerLayer", position: int) -> LayerChain:
        """Called by every layer when it is built, with its place in the block."""
        if position == 0:
            self._chain = LayerChain()
        assert position == len(self._chain.layers), "a block builds its layers in order"
        self._chain.layers.append(layer)
        return self._chain
