"""Where a schedule rebuilds what the hyper-connections dropped after the forward."""

import numpy as np

from mhc_megatron.pipeline.actions import Op
from mhc_megatron.pipeline.rows import OPS, PAIRED, Row, code, mbs_of, ops_of, stages_of
from mhc_megatron.pipeline.schedule import Schedule


def place_recompute(schedule: Schedule, *, in_overlaps: bool = True) -> Schedule:
    """Give every B and I an R of its own, right before it.

    A rebuild needs nothing from another rank, since the input of the stage is kept: as an action
    it runs in the time in which the gradient is still on its way (mHC, arXiv 2512.24880, section
    4.3.3). An Overlap is preceded by the R of its backward.

    Args:
        schedule: without any R.
        in_overlaps: False where Overlaps rebuild for themselves, among their phases.
    """
    rows = tuple(_with_recompute(row, in_overlaps) for row in schedule.ranks)
    return Schedule(
        name=schedule.name, placement=schedule.placement, num_mb=schedule.num_mb, ranks=rows
    )


def _with_recompute(row: Row, in_overlaps: bool) -> Row:
    ops = ops_of(row.codes)
    assert not (ops == OPS.index(Op.R)).any(), "the schedule has its rebuilds already"
    wanted = (ops == OPS.index(Op.B)) | (ops == OPS.index(Op.I))
    if not in_overlaps:
        wanted[1:] &= (row.codes[:-1] & PAIRED) == 0
    backward = np.flatnonzero(wanted)
    starts = row.starts()
    before = starts[np.searchsorted(starts, backward, side="right") - 1]
    values = row.codes[backward]
    rebuilds = [
        code(Op.R, stage, mb)
        for stage, mb in zip(stages_of(values).tolist(), mbs_of(values).tolist(), strict=True)
    ]
    return Row.from_codes(np.insert(row.codes, before, np.array(rebuilds, dtype=np.int64)))
