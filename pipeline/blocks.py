"""Which sublayers of a stage are rebuilt together, and how wide what stays in memory is.

mHC (arXiv 2512.24880, section 4.3.2): of a block of sublayers only the first n-stream state, and
of each sublayer the branch's output and the coefficients, stay until the backward; the other
states and the branches' inputs are rebuilt from them, without running a branch.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from mhc_megatron.pipeline.errors import ScheduleError

PolicyName = Literal["none", "block", "auto", "stage"]

# The branch's input before and after its norm.
BRANCH_INPUTS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class RecomputePolicy:
    """How the sublayers of each pipeline stage, or virtual stage, are cut into blocks.

    Attributes:
        name: ``none`` keeps everything; ``block`` rebuilds ``block`` sublayers together; ``auto``
            takes the block with the lowest peak in each stage (``best_block``); ``stage`` makes
            each stage one block.
        block: sublayers of a block, for ``block`` alone. Attention and MLP count separately.

    Raises:
        ScheduleError: an unknown name, a block without ``block`` or below 1, or ``block`` without
            one.
    """

    name: PolicyName = "none"
    block: int | None = None

    def __post_init__(self) -> None:
        known = get_args(PolicyName)
        if self.name not in known:
            raise ScheduleError(f"recompute={self.name!r} is not one of {', '.join(known)}")
        if self.name == "block":
            if self.block is None:
                raise ScheduleError(
                    "recompute='block' needs recompute_block, the sublayers of a block; set it, "
                    "or use recompute='auto'"
                )
            if not isinstance(self.block, int) or isinstance(self.block, bool):
                raise ScheduleError(
                    f"recompute_block={self.block!r} is not a whole number of sublayers"
                )
            if self.block < 1:
                raise ScheduleError(
                    f"recompute_block={self.block} must be at least 1; use recompute='none' to "
                    "keep everything"
                )
        elif self.block is not None:
            raise ScheduleError(
                f"recompute_block={self.block} is for recompute='block', not {self.name!r}; "
                "leave it out"
            )

    def block_of(self, *, num_sublayers: int, num_streams: int) -> int:
        """Sublayers of a block in a stage of ``num_sublayers``; 0 where nothing is rebuilt.

        Raises:
            ScheduleError: the stage is shorter than the block.
        """
        if self.name == "none":
            return 0
        if self.name == "auto":
            return best_block(num_sublayers=num_sublayers, num_streams=num_streams)
        if self.name == "stage":
            return num_sublayers
        assert self.block is not None
        check_block(self.block, num_sublayers=num_sublayers)
        return self.block


def check_block(block: int, *, num_sublayers: int) -> None:
    """Raise a ScheduleError if a stage of ``num_sublayers`` cannot hold the block."""
    if block > num_sublayers:
        raise ScheduleError(
            f"recompute_block={block} is above the {num_sublayers} "
            "sublayers of a stage; blocks end with the stage, so take fewer"
        )


def recompute_plan(*, num_sublayers: int, block: int) -> tuple[range, ...]:
    """The sublayers of each block of a stage, from the stage's first; the last may be shorter.

    Args:
        num_sublayers: of the stage; a plan never crosses a stage.
        block: from ``RecomputePolicy.block_of``; 0 gives no blocks.
    """
    if block == 0:
        return ()
    starts = range(0, num_sublayers, block)
    return tuple(range(start, min(start + block, num_sublayers)) for start in starts)


def kept_width(*, num_sublayers: int, num_streams: int, block: int) -> int:
    """What stays from forward to backward, per token in multiples of C.

    The first state of each block; without blocks every state and every branch's inputs. Branch
    outputs are kept in either case and not counted.
    """
    if block == 0:
        return (num_streams + BRANCH_INPUTS) * num_sublayers
    return num_streams * -(-num_sublayers // block)


def rebuilt_width(*, num_streams: int, block: int) -> int:
    """What the rebuild of one block adds, per token in multiples of C."""
    return (num_streams + BRANCH_INPUTS) * block


def split_rebuilt_width(*, num_sublayers: int, num_streams: int, block: int) -> int:
    """What the rebuilds of a stage add under a split backward, per token in multiples of C.

    The states of one block at a time, and the inputs of every branch, which stay until W.
    """
    return num_streams * block + wgrad_rebuilt_width(num_sublayers=num_sublayers, block=block)


def wgrad_rebuilt_width(*, num_sublayers: int, block: int) -> int:
    """What of it stays until W; without blocks nothing was dropped, and nothing is rebuilt."""
    return BRANCH_INPUTS * num_sublayers if block else 0


def peak_width(*, num_sublayers: int, num_streams: int, block: int) -> int:
    """``n ceil(L / L_r) + (n + 2) L_r``: the peak of one micro-batch (mHC, Eq. 20), times 1 / C."""
    kept = kept_width(num_sublayers=num_sublayers, num_streams=num_streams, block=block)
    return kept + rebuilt_width(num_streams=num_streams, block=block)


def best_block(*, num_sublayers: int, num_streams: int) -> int:
    """The block with the lowest ``peak_width``, exact in integers; of equals the shortest."""
    return min(
        range(1, num_sublayers + 1),
        key=lambda block: peak_width(
            num_sublayers=num_sublayers, num_streams=num_streams, block=block
        ),
    )
