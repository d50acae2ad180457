"""Bytes of activations and messages with n residual streams."""

import dataclasses
from dataclasses import dataclass

from mhc_megatron.pipeline.blocks import best_block, check_block, kept_width, rebuilt_width
from mhc_megatron.pipeline.errors import ScheduleError
from mhc_megatron.pipeline.fp8_size import packed_size

_SUBLAYERS = 2  # attention and MLP, each with a hyper-connection of its own


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSize:
    """The activations of one stage for one micro-batch.

    Counted per token and sublayer, in multiples of the hidden size C (mHC, arXiv 2512.24880,
    Table 3): the streams n, the branch's input before and after its norm 2, its output 1, and
    ``branch_width`` for what the branch keeps for its own backward.

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
    fp8_messages: bool = False

    def __post_init__(self) -> None:
        lowest = {"recompute_block": 0, "branch_width": 0, "fp8_messages": 0}
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
        branches = self.num_sublayers * (1 + self.branch_width)
        return self._bytes(branches) + self.kept_bytes

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
    def message_bytes(self) -> int:
        """One activation or gradient between stages: [s, b, n*C]."""
        return packed_size(self._message) if self.fp8_messages else self._bytes(self.streams)

    @property
    def _message(self) -> tuple[int, int, int]:
        return self.seq, self.micro_batch_size, self.streams * self.hidden

    def _bytes(self, width: int) -> int:
        return self.seq * self.micro_batch_size * self.hidden * self.element_bytes * width
