"""The executor with all ranks in one process, compared with a plain loop."""


import pytest
import torch
from helpers import stages
from torch import nn

from mhc_megatron.pipeline.catalogue import generate
from mhc_megatron.pipeline.recompute import place_recompute
from mhc_megatron.pipeline.schedule import Schedule

NAMES = ["gpipe", "one_f_one_b", "interleaved", "zb_h1", "dualpipe_v"]


def gradients(blocks: list[nn.Module]) -> list[torch.Tensor]:
    found = [parameter.grad for block in blocks for parameter in block.parameters()]
    assert all(gradient is not None for gradient in found)
    return found


def check(schedule: Schedule, seed: int) -> None:
    ours, theirs = (stages.modules(schedule.num_stages, seed) for _ in range(2))
    losses = stages.pipelined(schedule, ours, seed)
    assert torch.equal(torch.stack(losses), torch.stack(stages.serial(theirs, schedule.num_mb, seed)))
    # Every schedule here takes the backwards and weight gradients of a stage in the order of the
    # micro-batches, as the loop does: the sums are the same to the last bit.
    for a, b in zip(gradients(ours), gradients(theirs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", NAMES)
def test_four_ranks_equal_the_plain_loop(name: str, seed: int) -> None:
    num_mb = 8 + seed % 5 if name != "interleaved" else 4 * (1 + seed % 3)
    check(generate(name, num_ranks=4, num_mb=num_mb), seed)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_rebuilds_and_few_ranks(name: str, num_ranks: int) -> None:
    check(place_recompute(generate(name, num_ranks=num_ranks, num_mb=2 * num_ranks)), seed=7)
