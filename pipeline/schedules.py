"""The schedules with one direction: GPipe, 1F1B, interleaved 1F1B and ZB-H1.

A generator names operations and stages only; the micro-batches of each (operation, stage) are
counted afterwards, since every schedule takes them in order.
"""

from collections.abc import Callable, Sequence

from mhc_megatron.pipeline.actions import Op
from mhc_megatron.pipeline.errors import ScheduleError
from mhc_megatron.pipeline.placement import Placement, linear, looped
from mhc_megatron.pipeline.rows import MAX_MB, MAX_STAGES, Row, code
from mhc_megatron.pipeline.schedule import Schedule


def gpipe(num_ranks: int, num_mb: int) -> Schedule:
    """All forwards, then all backwards (Huang et al., arXiv 1811.06965).

    Raises:
        ScheduleError: a number is below 1.
    """

    def row(rank: int) -> list[int]:
        return [code(Op.F, rank)] * num_mb + [code(Op.B, rank)] * num_mb

    return build("gpipe", linear, num_ranks, num_mb, row)


def one_f_one_b(num_ranks: int, num_mb: int) -> Schedule:
    """1F1B (PipeDream-Flush; Narayanan et al., arXiv 2104.04473): a forward, a backward, by turns.

    Raises:
        ScheduleError: a number is below 1.
    """

    def row(rank: int) -> list[int]:
        forward, backward = code(Op.F, rank), code(Op.B, rank)
        ahead = min(num_ranks - 1 - rank, num_mb)
        steady = [forward, backward] * (num_mb - ahead)
        return [forward] * ahead + steady + [backward] * ahead

    return build("one_f_one_b", linear, num_ranks, num_mb, row)


def interleaved(num_ranks: int, num_mb: int, num_chunks: int = 2) -> Schedule:
    """1F1B over ``num_chunks`` stages per rank, taken in groups of ``num_ranks`` micro-batches.

    The order is Megatron's (``forward_backward_pipelining_with_interleaving``).

    Raises:
        ScheduleError: a number is below 1, or ``num_mb`` is no multiple of ``num_ranks``.
    """
    _at_least_one(num_chunks=num_chunks, num_ranks=num_ranks)
    if num_mb % num_ranks:
        below = num_mb - num_mb % num_ranks
        raise ScheduleError(
            f"num_mb={num_mb} is not a multiple of num_ranks={num_ranks}, which interleaved needs; "
            f"take {below + num_ranks}{f' or {below}' if below else ''}, or one_f_one_b"
        )
    total = num_mb * num_chunks

    def row(rank: int) -> list[int]:
        stages = [rank + num_ranks * chunk for chunk in range(num_chunks)]
        groups = num_mb // num_ranks
        forward = [code(Op.F, stage) for stage in stages for _ in range(num_ranks)] * groups
        backward = [code(Op.B, stage) for stage in stages[::-1] for _ in range(num_ranks)] * groups
        ahead = min(2 * (num_ranks - 1 - rank) + (num_chunks - 1) * num_ranks, total)
        steady = [
            action
            for pair in zip(forward[ahead:], backward[: total - ahead], strict=True)
            for action in pair
        ]
        return forward[:ahead] + steady + backward[total - ahead :]

    return build("interleaved", lambda p: looped(p, num_chunks), num_ranks, num_mb, row)


def zb_h1(num_ranks: int, num_mb: int) -> Schedule:
    """ZB-H1 (Qi et al., arXiv 2401.10241): 1F1B with the weight gradients postponed.

    Rank r leaves r weight gradients pending, so that it holds as many micro-batches as rank 0 of
    1F1B, and fills the end of the step with them.

    Raises:
        ScheduleError: a number is below 1.
    """

    def row(rank: int) -> list[int]:
        forward, dgrad, wgrad = code(Op.F, rank), code(Op.I, rank), code(Op.W, rank)
        ahead, pending = min(num_ranks - 1 - rank, num_mb), min(rank, num_mb)
        turns = [[forward, dgrad]] * (num_mb - ahead) + [[dgrad]] * ahead
        late = [action for turn in turns[pending:] for action in (*turn, wgrad)]
        early = [action for turn in turns[:pending] for action in turn]
        return [forward] * ahead + early + late + [wgrad] * pending

    return build("zb_h1", linear, num_ranks, num_mb, row)


def build(
    name: str,
    place: Callable[[int], Placement],
    num_ranks: int,
    num_mb: int,
    row: Callable[[int], Sequence[int]],
) -> Schedule:
    """A schedule from the unnumbered codes of every rank.

    Raises:
        ScheduleError: a number is below 1 or above what a code can hold.
    """
    _at_least_one(num_ranks=num_ranks, num_mb=num_mb)
    placement = place(num_ranks)
    if num_mb > MAX_MB or placement.num_stages > MAX_STAGES:
        raise ScheduleError(
            f"num_mb={num_mb} with {placement.num_stages} stages is above the limits of "
            f"{MAX_MB} micro-batches and {MAX_STAGES} stages; take a smaller step"
        )
    rows = []
    for rank in range(num_ranks):
        turned: dict[int, int] = {}
        if placement.mirrored_from is not None:
            turned[num_ranks - 1 - rank] = placement.mirrored_from
        rows.append(Row.numbered(row(rank), turned))
    return Schedule(name=name, placement=placement, num_mb=num_mb, ranks=tuple(rows))


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ScheduleError(f"{name}={number} must be at least 1")
