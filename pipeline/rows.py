"""What one rank does, in order, stored as one integer per compute.

A thousand ranks times thousands of micro-batches are millions of actions: as objects they need
gigabytes and minutes. Iterating makes the objects on the way.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

from mhc_megatron.pipeline.actions import Action, Compute, Op, Overlap, parts

OPS = tuple(Op)

# Bits of a code, from the lowest: micro-batch, stage, operation, "overlaps with the next code".
_MB_BITS, _STAGE_BITS, _OP_BITS = 24, 24, 4
_STAGE = _MB_BITS
_OP = _STAGE + _STAGE_BITS
PAIRED = 1 << (_OP + _OP_BITS)
MAX_MB, MAX_STAGES = 1 << _MB_BITS, 1 << _STAGE_BITS


def code(op: Op, stage: int, mb: int = 0) -> int:
    """The integer for one compute; or with PAIRED for the forward of an Overlap."""
    return OPS.index(op) << _OP | stage << _STAGE | mb


def ops_of(codes: np.ndarray) -> np.ndarray:
    """Indices into OPS."""
    return codes >> _OP & ((1 << _OP_BITS) - 1)


def stages_of(codes: np.ndarray) -> np.ndarray:
    """Stage of every compute."""
    return codes >> _STAGE & (MAX_STAGES - 1)


def mbs_of(codes: np.ndarray) -> np.ndarray:
    """Micro-batch of every compute."""
    return codes & (MAX_MB - 1)


def compute_of(value: int) -> Compute:
    """The compute behind one code."""
    op = OPS[value >> _OP & ((1 << _OP_BITS) - 1)]
    return Compute(op, value >> _STAGE & (MAX_STAGES - 1), value & (MAX_MB - 1))


class Row(Collection[Action]):
    """An immutable sequence of actions. Equal to another row with the same actions.

    Attributes:
        codes: int64, one per compute; the forward of an Overlap carries PAIRED and its backward
            follows.
    """

    __slots__ = ("codes",)
    codes: np.ndarray

    def __init__(self, actions: Iterable[Action]) -> None:
        values = []
        for action in actions:
            values += [code(c.op, c.stage, c.mb) for c in parts(action)]
            if isinstance(action, Overlap):
                values[-2] |= PAIRED
        self.codes = np.array(values, dtype=np.int64)

    @classmethod
    def from_codes(cls, codes: np.ndarray) -> "Row":
        """A row of ready-made codes, which must not change afterwards."""
        row = cls.__new__(cls)
        row.codes = codes
        return row

    @classmethod
    def numbered(cls, tokens: Sequence[int], first_mb: dict[int, int]) -> "Row":
        """Number the micro-batches: every stage takes its own in increasing order.

        B and I are counted together, as either is the backward of a micro-batch; the weight
        gradients take the micro-batches of the I in their order.

        Args:
            tokens: codes without a micro-batch.
            first_mb: for a stage, the micro-batch that its first one is; 0 for absent stages.
        """
        codes = np.array(tokens, dtype=np.int64)
        ops, stages = ops_of(codes), stages_of(codes)
        forward, dgrad, wgrad = (ops == OPS.index(op) for op in (Op.F, Op.I, Op.W))
        for stage in np.unique(stages).tolist():
            here = stages == stage
            for kind in (forward, ~forward & ~wgrad):
                found = np.flatnonzero(here & kind)
                codes[found] += np.arange(len(found)) + first_mb.get(stage, 0)
            codes[here & wgrad] += mbs_of(codes[here & dgrad])
        return cls.from_codes(codes)

    def starts(self) -> np.ndarray:
        """Positions in ``codes`` at which an action starts."""
        second = np.zeros(len(self.codes), dtype=bool)
        second[1:] = (self.codes[:-1] & PAIRED) != 0
        return np.flatnonzero(~second)

    def __len__(self) -> int:
        return len(self.codes) - int(np.count_nonzero(self.codes & PAIRED))

    def __iter__(self) -> Iterator[Action]:
        values = iter(self.codes.tolist())
        for value in values:
            first = compute_of(value)
            yield Overlap(first, compute_of(next(values))) if value & PAIRED else first

    def __contains__(self, action: object) -> bool:
        return any(action == own for own in self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Row) and np.array_equal(self.codes, other.codes)

    def __hash__(self) -> int:
        return hash(self.codes.tobytes())

    def __repr__(self) -> str:
        return f"Row({', '.join(str(action) for action in self)})"
