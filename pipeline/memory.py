"""Bytes of activations and messages with n residual streams."""

import dataclasses
from dataclasses import dataclass

from mhc_megatron.pipeline.blocks import (
    best_block,
    check_block,
    kept_width,
    rebuilt_width,
    split_rebuilt_width,
    wgrad_rebuilt_width,
)
from mhc_megatron.pipeline.costs import StageCosts
from mhc_megatron.pipeline.errors import ScheduleError
from mhc_megatron.pipeline.fp8_size import packed_size

_SUBLAYERS = 2  # attention and MLP, each with a hyper-connection of its own


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSize:
    """The activations of one stage for one micro-batch.

    Counted per token and sublayer, in multiples of the hidden size C (mHC, arXiv 2512.24880,
    Table 3): the streams n, the branch's input before and after its norm 2, its output 1, and
    ``branch_width`` for what the branch keeps for its own backward. Besides, as the kernels keep
    them, ``coefficients`` float32 numbers, and per sublayer phi in parts.

    Attributes:
        hidden: C.
        seq: tokens of a sequence on this rank (divide by context and sequence parallelism).
        micro_batch_size: sequences of a micro-batch.
        num_layers: transformer layers of the stage.
        streams: n.
        recompute_block: sublayers that are rebuilt from one kept state; 0 keeps everything, None
            takes the block with the lowest peak.
        branch_width: in multiples of C. 6 is a dense layer with flash attention and an MLP of 4 C
            without dropout, 12 C in two branches: Korthikanti et al. (arXiv 2205.05198) without
            the scores, the dropout masks and the inputs, which are counted here as streams.
        element_bytes: 2 for bf16.
        logits: M, the projected numbers per token and sublayer, the rows of phi; None for
            n^2 + 2n.
        phi_parts: how often the kernels keep phi, [M, n*C] in two bytes a number, for every
            forward: 2 with streams in bf16, 0 with others, whose products read the parameter.
        fp8_messages: stages send eight bits a number, and their scales (``fp8_size``).

    Raises:
        ScheduleError: a number is out of range.
    """

    hidden: int
    seq: int
    micro_batch_size: int = 1
    num_layers: int = 1
    streams: int = 4
    recompute_block: int | None = None
    branch_width: int = 6
    element_bytes: int = 2
    logits: int | None = None
    phi_parts: int = 2
    fp8_messages: bool = False

    def __post_init__(self) -> None:
        lowest = {"recompute_block": 0, "branch_width": 0, "phi_parts": 0, "fp8_messages": 0}
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), lowest.get(field.name, 1)
            if value is not None and value < least:
                raise ScheduleError(f"{field.name}={value} must be at least {least}")
        if self.recompute_block is not None:
            check_block(self.recompute_block, num_sublayers=self.num_sublayers)
        if self.fp8_messages:
            try:
                packed_size(self._message)
            except ValueError as error:
                raise ScheduleError(
                    f"{error}; change hidden, or send messages as they are"
                ) from None

    @property
    def num_sublayers(self) -> int:
        """Attention and MLP branches of the stage."""
        return _SUBLAYERS * self.num_layers

    @property
    def block(self) -> int:
        """The recompute block in use; 0 for none."""
        if self.recompute_block is not None:
            return self.recompute_block
        return best_block(num_sublayers=self.num_sublayers, num_streams=self.streams)

    @property
    def held_bytes(self) -> int:
        """Kept from the forward to the end of the backward."""
        branches = self.output_bytes + self.branch_bytes
        return branches + self.coefficient_bytes + self.phi_bytes + self.kept_bytes

    @property
    def output_bytes(self) -> int:
        """The branches' outputs."""
        return self._bytes(self.num_sublayers)

    @property
    def branch_bytes(self) -> int:
        """What the branches keep for their own backward."""
        return self._bytes(self.num_sublayers * self.branch_width)

    @property
    def coefficients(self) -> int:
        """Float32 numbers per token and sublayer: the mappings n (n + 2), the logits M, 1/RMS of
        the n streams and of the branch's input."""
        return self.streams * (self.streams + 2) + self.num_logits + 2

    @property
    def coefficient_bytes(self) -> int:
        """The part of ``held_bytes`` in ``coefficients``."""
        return 4 * self.num_sublayers * self.seq * self.micro_batch_size * self.coefficients

    @property
    def num_logits(self) -> int:
        """M."""
        return self.streams * (self.streams + 2) if self.logits is None else self.logits

    @property
    def phi_bytes(self) -> int:
        """The part of ``held_bytes`` in phi's parts."""
        numbers = self.num_logits * self.streams * self.hidden
        return 2 * self.num_sublayers * self.phi_parts * numbers

    @property
    def kept_bytes(self) -> int:
        """The part of ``held_bytes`` that the recompute block decides."""
        return self._bytes(
            kept_width(num_sublayers=self.num_sublayers, num_streams=self.streams, block=self.block)
        )

    @property
    def rebuilt_bytes(self) -> int:
        """What a rebuild adds: the streams and branch inputs of one block at a time."""
        return self._bytes(rebuilt_width(num_streams=self.streams, block=self.block))

    @property
    def split_rebuilt_bytes(self) -> int:
        """The same where I and W are apart, and branch inputs wait for W."""
        return self._bytes(
            split_rebuilt_width(
                num_sublayers=self.num_sublayers, num_streams=self.streams, block=self.block
            )
        )

    @property
    def wgrad_rebuilt_bytes(self) -> int:
        """Of it, what stays until W."""
        return self._bytes(wgrad_rebuilt_width(num_sublayers=self.num_sublayers, block=self.block))

    def costs(self, base: StageCosts | None = None) -> StageCosts:
        """These bytes for the simulator, with the times of ``base``."""
        return dataclasses.replace(
            StageCosts() if base is None else base,
            held_bytes=self.held_bytes,
            rebuilt_bytes=self.rebuilt_bytes,
            split_rebuilt_bytes=self.split_rebuilt_bytes,
            wgrad_rebuilt_bytes=self.wgrad_rebuilt_bytes,
        )

    @property
    def message_bytes(self) -> int:
        """One activation or gradient between stages: [s, b, n*C]."""
        return packed_size(self._message) if self.fp8_messages else self._bytes(self.streams)

    @property
    def _message(self) -> tuple[int, int, int]:
        return self.seq, self.micro_batch_size, self.streams * self.hidden

    def _bytes(self, width: int) -> int:
        return self.seq * self.micro_batch_size * self.hidden * self.element_bytes * width
