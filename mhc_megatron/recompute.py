"""Dropping what hyper-connections keep between forward and backward, and rebuilding it in place.

The graph stays as it is: what is dropped is memory, not tensors. After the forward the storages of
the states inside a block, and of the branches' inputs before and after their norm, are emptied;
before the backward enters the block they are filled with the same bits. So every gradient is
summed in the same order as without recompute, and a split backward finds what it needs.
(mHC, arXiv 2512.24880, section 4.3.2; Megatron's CheckpointWithoutOutput empties storages alike.)
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mhc_megatron import kernels
from mhc_megatron.branch_norm import BranchNorm
from mhc_megatron.config import MHCConfig
from mhc_megatron.dropped import Dropped
from mhc_megatron.errors import UserError
from mhc_megatron.hyper_connection import Mix, Observer, normalises
from mhc_megatron.pipeline.blocks import recompute_plan

CudaStreams = Sequence["torch.cuda.Stream"]


class _Block:
    """The sublayers of one block in one forward. Holds aliases only, so the graph can own it."""

    def __init__(
        self, streams: Tensor, mhc: MHCConfig, observer: Observer | None, lanes: CudaStreams
    ) -> None:
        self._first: Tensor | None = streams.data
        self._mhc = mhc
        self._observer = observer
        self._lanes = lanes
        self._states: list[Dropped] = []
        self._inputs: list[Dropped] = []
        self._normed: list[tuple[int, Dropped, Callable[[Tensor], Tensor]]] = []
        self._norm_weights: list[Tensor | None] = []
        self._branches: list[Tensor] = []
        self._biases: list[Tensor | None] = []
        self._mixes: list[Mix] = []
        self._spent = False
        self._ahead: torch.cuda.Event | None = None
        if streams.requires_grad:
            streams.register_hook(self._leave)

    def branch_done(
        self,
        branch_input: Tensor,
        normed: Tensor,
        norm: nn.Module,
        output: Tensor,
        bias: Tensor | None,
        mix: Mix,
    ) -> None:
        norm_weight = None
        if normalises(mix):
            assert isinstance(norm, BranchNorm)
            norm_weight = norm.weight.data
        self._norm_weights.append(norm_weight)
        if normed.untyped_storage()._cdata != branch_input.untyped_storage()._cdata:
            self._normed.append((len(self._inputs), Dropped(normed), norm))
        self._inputs.append(Dropped(branch_input))
        self._branches.append(output.data)
        self._biases.append(None if bias is None else bias.data)
        self._mixes.append(_without_graph(mix))

    def drop_state(self, streams: Tensor) -> None:
        self._states.append(Dropped(streams))

    def enter(self, *_: object) -> None:
        """Called before the backward enters the block."""
        if self._spent:
            raise UserError(
                "a second backward through hyper-connections whose states are dropped after the "
                "first; use recompute='none' for retain_graph=True"
            )
        self.rebuild()
        if self._ahead is not None:
            torch.cuda.current_stream().wait_event(self._ahead)
            self._ahead = None

    def rebuild_ahead(self) -> None:
        """``rebuild`` on the current stream; what enters the block waits for it."""
        self.rebuild()
        if self._lanes:
            self._ahead = torch.cuda.current_stream().record_event()

    @torch.no_grad()
    def rebuild(self) -> None:
        """Fill what was dropped; nothing if that is done."""
        if self._first is None:
            return
        if self._observer is None:
            self._fill(self._first)
        else:
            self._observer(self._fill, self._first)
        normed = [dropped for _, dropped, _ in self._normed]
        for dropped in (*self._states, *self._inputs, *normed):
            # Its memory is the current stream's, and others use it.
            for lane in self._lanes:
                dropped.alias.record_stream(lane)
        # The kernels' backward reads states once. The reference's nodes are many, and a split
        # backward returns to some of them.
        if not isinstance(self._mixes[0], kernels.PackedMappings):
            self._states.clear()
        for held in (self._inputs, self._normed, self._branches, self._biases, self._mixes):
            held.clear()
        self._norm_weights.clear()
        self._first = None

    def _fill(self, first: Tensor) -> None:
        n = self._mhc.num_streams
        inputs = [dropped.restore() for dropped in self._inputs]
        states = [dropped.restore().unflatten(-1, (n, -1)) for dropped in self._states]
        kernels.rebuild(
            first.unflatten(-1, (n, -1)),
            self._branches[:-1],
            self._mixes,
            branch_biases=self._biases[:-1],
            norm_weights=self._norm_weights,
            out=kernels.Rebuilt(states, inputs),
            backend=self._mhc.backend,
        )
        for index, dropped, norm in self._normed:
            dropped.restore().copy_(norm(inputs[index]))

    def _leave(self, _: Tensor) -> None:
        """Called with the gradient of the first state: nobody reads the others any more."""
        self._spent = True
        for dropped in self._states:
            dropped.drop()
        self._states.clear()


class ForwardRecompute:
    """What one forward of a stage dropped.

    Every block is rebuilt when the backward reaches it. ``rebuild`` does that for the block that
    the backward enters first, while the gradient is still on its way.
    """

    def __init__(
        self,
        plan: Sequence[range],
        mhc: MHCConfig,
        observer: Observer | None = None,
        lanes: CudaStreams = (),
    ) -> None:
        self._starts = {block.start for block in plan}
        self._ends = {block.stop - 1 for block in plan}
        self._mhc = mhc
        self._observer, self._lanes = observer, lanes
        self._block: _Block | None = None
        self._blocks: list[_Block] = []
        self._storage: int | None = None

    def branch_done(
        self,
        sublayer: int,
        *,
        streams: Tensor,
        branch_input: Tensor,
        normed: Tensor,
        norm: nn.Module,
        output: Tensor,
        bias: Tensor | None,
        mix: Mix,
    ) -> None:
        """The branch of a sublayer has run: its inputs are dropped.

        Args:
            sublayer: its number in the stage, from 0 and in order.
            streams: what it reads, [s, b, n*C].
            branch_input, normed: [s, b, C] before and after ``norm``.
            norm: of the branch; the identity if the branch has its norm inside. What the
                hyper-connection normalised it normalises again, with this one's weight.
            output, bias: of the branch, [s, b, C] and [C] or None.
            mix: the sublayer's mappings.

        Raises:
            UserError: ``streams`` are not what the sublayer before wrote.
        """
        storage = streams.untyped_storage()._cdata
        if self._storage not in (None, storage):
            raise UserError(
                "hidden states were replaced between two layers, so the states after them cannot "
                "be rebuilt; leave them as they are, or use recompute='none'"
            )
        if sublayer in self._starts:
            self._block = _Block(streams, self._mhc, self._observer, self._lanes)
            self._blocks.append(self._block)
        assert self._block is not None
        self._block.branch_done(branch_input, normed, norm, output, bias, mix)

    def streams_done(self, sublayer: int, *, streams: Tensor, new_streams: Tensor) -> None:
        """A sublayer has written its streams: those it read are dropped, but for a block's first.

        Args:
            sublayer, streams: as for ``branch_done``.
            new_streams: [s, b, n*C], with the graph of this forward.
        """
        assert self._block is not None
        if sublayer not in self._starts:
            self._block.drop_state(streams)
        if sublayer in self._ends:
            node = new_streams.grad_fn
            if node is not None:  # there is a backward
                node.register_prehook(self._block.enter)
        self._storage = new_streams.untyped_storage()._cdata

    def blocks_from_the_end(self) -> list[_Block]:
        """In the order in which the backward enters them."""
        return self._blocks[::-1]

    def rebuild(self) -> None:
        """Rebuild the last block now; what is not called happens in the backward."""
        assert self._block is not None
        self._block.rebuild()


class StreamRecompute:
    """The recompute of one stage.

    Args:
        mhc: with a policy other than ``none``.
        num_sublayers: of the stage.

    Attributes:
        plan: the sublayers of each block.
        observer: runs the rebuilding of every block whose forward starts from now on, as that of a
            ``HyperConnection`` runs its kernels; None for nobody.

    Raises:
        UserError: the stage is shorter than the block.
    """

    def __init__(self, mhc: MHCConfig, *, num_sublayers: int) -> None:
        block = mhc.block_of(num_sublayers)
        self.plan = recompute_plan(num_sublayers=num_sublayers, block=block)
        self._mhc = mhc
        self.observer: Observer | None = None
        self._latest: ForwardRecompute | None = None

    def begin(self, lanes: CudaStreams = ()) -> ForwardRecompute:
        """A forward of the stage starts.

        Args:
            lanes: the streams that use what it drops, if there are several.
        """
        self._latest = ForwardRecompute(self.plan, self._mhc, self.observer, lanes)
        return self._latest

    @property
    def current(self) -> ForwardRecompute:
        """The forward that started last."""
        assert self._latest is not None
        return self._latest

    def take(self) -> ForwardRecompute:
        """The forward that started last and has ended, to ``rebuild`` it by hand."""
        latest, self._latest = self.current, None
        return latest


def _without_graph(mix: Mix) -> Mix:
    if isinstance(mix, kernels.PackedMappings):
        return kernels.PackedMappings(
            mix.packed.data, mix.num_streams, mix.tokens, inverse_rms=mix.inverse_rms
        )
    return kernels.Mappings(*(part.data for part in mix))
