"""Training places the rebuild of what recompute dropped as an action of the schedule."""

import itertools
from typing import Any

import pytest

from mhc_megatron.config import MHCConfig
from mhc_megatron.pipeline.actions import Compute, Op, Overlap, parts
from mhc_megatron.training.config import ModelConfig, ParallelConfig, TrainConfig
from mhc_megatron.training.pipeline import pipeline_schedule


def rows(recompute: Any, overlap: Any = "none", **model: Any) -> list[list[Any]]:
    parallel = ParallelConfig(pipeline=2, schedule="dualpipe_v", overlap=overlap)
    config = TrainConfig(
        model=ModelConfig(**model),
        mhc=MHCConfig(recompute=recompute),
        parallel=parallel,
        micro_batch_size=1,
        global_batch_size=8,
    )
    return [list(row) for row in pipeline_schedule(config).ranks]


def test_before_every_backward() -> None:
    for row in rows("auto"):
        backwards = 0
        for before, action in itertools.pairwise(row):
            for compute in parts(action):
                if compute.op in (Op.B, Op.I):
                    backwards += 1
                    assert before == Compute(Op.R, compute.stage, compute.mb)
        assert backwards == 2 * 8  # of two stages


def test_not_before_an_overlap_that_rebuilds_by_itself() -> None:
    for row in rows("auto", overlap="all"):
        for before, action in itertools.pairwise(row):
            rebuilt = isinstance(before, Compute) and before.op is Op.R
            if isinstance(action, Overlap):
                assert not rebuilt
            elif action.op in (Op.B, Op.I):
                assert rebuilt


@pytest.mark.parametrize(("recompute", "model"), [("none", {}), ("auto", {"residual": "plain"})])
def test_nowhere_without_something_to_rebuild(recompute: str, model: dict[str, Any]) -> None:
    found = [action for row in rows(recompute, **model) for action in row]
    assert found and not [a for a in found if isinstance(a, Compute) and a.op is Op.R]
