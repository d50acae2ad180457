"""DualPipe and DualPipeV: two streams of micro-batches through every rank.

Both are one schedule in eight steps (DeepSeek-V3, arXiv 2412.19437, and its cut-in-half variant):
a rank sees two stages, whose micro-batches come from its two neighbours. They differ in where the
stages are and in how many micro-batches each stage sees.
"""

from collections import deque

from mhc_megatron.pipeline.actions import Op
from mhc_megatron.pipeline.errors import ScheduleError
from mhc_megatron.pipeline.placement import mirrored, vee
from mhc_megatron.pipeline.rows import PAIRED, code
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.schedules import build


def dualpipe_v(num_ranks: int, num_mb: int) -> Schedule:
    """Two stages per rank in a V: no second copy of the parameters.

    Raises:
        ScheduleError: ``num_mb`` is below ``2 * num_ranks``, or a number below 1.
    """
    _enough("dualpipe_v", num_ranks, num_mb)

    def row(rank: int) -> list[int]:
        return _steps(num_ranks, rank, num_mb, near=rank, far=2 * num_ranks - 1 - rank)

    return build("dualpipe_v", vee, num_ranks, num_mb, row)


def dualpipe(num_ranks: int, num_mb: int) -> Schedule:
    """Two directions over two copies of the parameters; the half of ``num_mb`` in each.

    Raises:
        ScheduleError: ``num_mb`` is odd or below ``2 * num_ranks``, or ``num_ranks`` is odd.
    """
    for name, number in (("num_ranks", num_ranks), ("num_mb", num_mb)):
        if number % 2:
            raise ScheduleError(
                f"{name}={number} is odd, and dualpipe has two directions; "
                f"take {number + 1}, or dualpipe_v"
            )
    _enough("dualpipe", num_ranks, num_mb)

    def row(rank: int) -> list[int]:
        near, far = sorted((rank, num_ranks - 1 - rank))
        return _steps(num_ranks // 2, near, num_mb // 2, near=near, far=far)

    return build("dualpipe", lambda p: mirrored(p, num_mb), num_ranks, num_mb, row)


def _steps(depth: int, place: int, num_mb: int, *, near: int, far: int) -> list[int]:
    """One rank's codes without micro-batches.

    Args:
        depth: ranks between the entry and the turn, both counted.
        place: this rank's distance from the entry; ``depth - 1`` is the turn.
        num_mb: micro-batches of each of the two stages.
        near: the stage whose micro-batches come from the entry's side.
        far: the stage whose micro-batches come from the turn's side.
    """
    inner = depth - 1 - place  # ranks between this one and the turn
    f0, b0, i0 = (code(op, near) for op in (Op.F, Op.B, Op.I))
    f1, b1, i1 = (code(op, far) for op in (Op.F, Op.B, Op.I))
    w1 = code(Op.W, far)

    fill = [f0] * (2 * inner) + [f0, f1] * (place + 1)
    turn = [i1, w1, f1] * inner

    main = [f0 | PAIRED, b1, f1 | PAIRED, b0] * (num_mb - 2 * depth + place + 1)
    if inner == 0:
        main[0] = f0  # at the turn, b1 waits for the forward just before it, not for this one

    drain = [b1, f1 | PAIRED, b0] * inner
    # The second half of the last backwards is split: their weight gradients fill the gaps left.
    drain += ([b1, b0] * (place + 1))[: place + 1]
    split = ([i1, i0] * (place + 1))[place + 1 :]
    pending = deque(_wgrad_of(dgrad) for dgrad in split)
    drain += split
    for _ in range(inner):
        drain += [pending.popleft(), i0]
        pending.append(_wgrad_of(i0))
    return fill + turn + main + drain + list(pending)


def _wgrad_of(dgrad: int) -> int:
    return dgrad - code(Op.I, 0) + code(Op.W, 0)


def _enough(name: str, num_ranks: int, num_mb: int) -> None:
    if num_ranks >= 1 and num_mb < 2 * num_ranks:
        raise ScheduleError(
            f"num_mb={num_mb} is below 2*num_ranks={2 * num_ranks}, which {name} needs; "
            "take more micro-batches, or one_f_one_b"
        )
