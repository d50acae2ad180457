"""Recompute policies: bad ones, the plan of a stage, and the block with the lowest peak."""

import pytest

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.pipeline.blocks import (
    RecomputePolicy,
    best_block,
    kept_width,
    peak_width,
    recompute_plan,
)
from mhc_megatron.pipeline.errors import ScheduleError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("full", None), "recompute='full' is not one of none, block, auto, stage"),
        (
            ("block", None),
            "recompute='block' needs recompute_block, the sublayers of a block; set it, or use "
            "recompute='auto'",
        ),
        (
            ("block", 0),
            "recompute_block=0 must be at least 1; use recompute='none' to keep everything",
        ),
        (("auto", 2), "recompute_block=2 is for recompute='block', not 'auto'; leave it out"),
        (("none", 2), "recompute_block=2 is for recompute='block', not 'none'; leave it out"),
    ],
)
def test_bad_policies(arguments: tuple, message: str) -> None:
    name, block = arguments
    with pytest.raises(ScheduleError) as policy:
        RecomputePolicy(name=name, block=block)
    with pytest.raises(UserError) as config:
        MHCConfig(recompute=name, recompute_block=block)
    assert str(policy.value) == str(config.value) == message


def test_blocks_of_a_stage() -> None:
    sizes = {"num_sublayers": 7, "num_streams": 4}
    assert RecomputePolicy().block_of(**sizes) == 0
    assert RecomputePolicy(name="block", block=3).block_of(**sizes) == 3
    assert RecomputePolicy(name="auto").block_of(**sizes) == best_block(**sizes)
    assert RecomputePolicy(name="stage").block_of(**sizes) == 7
    with pytest.raises(ScheduleError, match="recompute_block=8 is above the 7 sublayers of a st"):
        RecomputePolicy(name="block", block=8).block_of(**sizes)
    assert recompute_plan(num_sublayers=7, block=0) == ()
    assert recompute_plan(num_sublayers=7, block=3) == (range(3), range(3, 6), range(6, 7))


@pytest.mark.parametrize("num_streams", [1, 2, 4, 8])
def test_the_best_block_is_the_lowest_of_all(num_streams: int) -> None:
    for num_sublayers in range(1, 130):

        def peak(block: int, num_sublayers: int = num_sublayers) -> int:
            # mHC, Eq. 20, counted block by block
            starts = len(range(0, num_sublayers, block))
            return num_streams * starts + (num_streams + 2) * block

        best = best_block(num_sublayers=num_sublayers, num_streams=num_streams)
        peaks = [peak(block) for block in range(1, num_sublayers + 1)]
        assert best == 1 + peaks.index(min(peaks))
        sizes = {"num_sublayers": num_sublayers, "num_streams": num_streams}
        assert peak_width(**sizes, block=best) == min(peaks)
        assert kept_width(**sizes, block=0) == (num_streams + 2) * num_sublayers
