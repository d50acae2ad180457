"""A stage without Megatron: memory goes and comes back, and with the graph it goes for good."""

import gc
import weakref
from typing import Any

import pytest
import torch
from helpers.sublayers import run_sublayers
from torch import Tensor, nn

from mhc_megatron import recompute
from mhc_megatron.config import MHCConfig
from mhc_megatron.hyper_connection import HyperConnection
from mhc_megatron.recompute import StreamRecompute

SUBLAYERS, CHANNELS = 5, 8
MHC = MHCConfig(recompute="block", recompute_block=2, backend="reference")


class Stage(nn.Module):
    """Linear branches, and norms that are functions."""

    def __init__(self) -> None:
        super().__init__()
        self.connections = nn.ModuleList(
            HyperConnection(MHC, hidden_size=CHANNELS, sublayer=index) for index in range(SUBLAYERS)
        )
        self.branches = nn.ModuleList(nn.Linear(CHANNELS, CHANNELS) for _ in range(SUBLAYERS))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)

    def forward(self, streams: Tensor, dropping: recompute.ForwardRecompute | None) -> Tensor:
        # The branch of one sublayer has its norm inside.
        norms = [torch.tanh if index != 1 else nn.Identity() for index in range(SUBLAYERS)]
        sublayers = zip(self.connections, norms, self.branches, strict=True)
        return run_sublayers(streams, sublayers, dropping)


def gradients(stage: Stage, x: Tensor, dropping: recompute.ForwardRecompute | None) -> list[Tensor]:
    leaves = [x, *stage.parameters()]
    stage.zero_grad()
    x.grad = None
    stage(x, dropping).square().sum().backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def test_the_same_bits() -> None:
    torch.manual_seed(0)
    stage = Stage()
    x = torch.randn(3, 1, 4 * CHANNELS, requires_grad=True)
    stage_recompute = StreamRecompute(MHC, num_sublayers=SUBLAYERS)
    assert stage_recompute.plan == (range(2), range(2, 4), range(4, 5))
    expected = [gradient.clone() for gradient in gradients(stage, x, None)]
    found = gradients(stage, x, stage_recompute.begin())
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    assert all(gradient.abs().sum() > 0 for gradient in expected)


@pytest.mark.parametrize("backward", [True, False])
def test_nothing_outlives_the_graph(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cycle keeps a step's memory until the garbage collector comes by."""
    blocks: list[weakref.ref] = []
    initialise = recompute._Block.__init__

    def watched(self: recompute._Block, *arguments: Any) -> None:
        initialise(self, *arguments)
        blocks.append(weakref.ref(self))

    monkeypatch.setattr(recompute._Block, "__init__", watched)
    stage, stage_recompute = Stage(), StreamRecompute(MHC, num_sublayers=SUBLAYERS)
    x = torch.randn(3, 1, 4 * CHANNELS, requires_grad=True)
    gc.disable()
    try:
        output = stage(x, stage_recompute.begin())
        if backward:
            output.sum().backward()
        stage_recompute.take()
        assert len(blocks) == 3 and all(block() is not None for block in blocks)
        del output, x
        assert all(block() is None for block in blocks)
    finally:
        gc.enable()


def test_no_backward_no_hooks() -> None:
    """A frozen stage with frozen input has no graph; dropping is then for good."""
    stage, stage_recompute = Stage().requires_grad_(False), StreamRecompute(MHC, num_sublayers=5)
    x = torch.randn(3, 1, 4 * CHANNELS)
    assert torch.equal(stage(x, stage_recompute.begin()), stage(x, None))
