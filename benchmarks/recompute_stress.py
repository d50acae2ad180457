"""Bits of many steps under every policy, while another stream takes and returns memory."""

from typing import Any

import torch
from recompute_stage import FeedForward, Size, Stage, begin, inputs, policies, shape
from torch import Tensor

from mhc_megatron.branch_norm import BranchNorm
from mhc_megatron.config import MHCConfig
from mhc_megatron.recompute import ForwardRecompute


def gradients_of(stage: Stage, x: Tensor, recompute: ForwardRecompute | None) -> list[Tensor]:
    """Every gradient of one step."""
    leaves = [x, *stage.parameters()]
    for leaf in leaves:
        leaf.grad = None
    stage(x, recompute).square().mean().backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def stress_line(size: Size, steps: int) -> dict[str, Any]:
    """Steps whose gradients differ in any bit from those without recompute."""
    base = MHCConfig(num_streams=size.streams)
    stage = Stage(size, base, lambda index: FeedForward(size.channels), norm=BranchNorm)
    x = inputs(size)
    expected = [gradient.clone() for gradient in gradients_of(stage, x, None)]
    chosen = list(policies(base, size).values())[1:]
    on_gpu = size.device == "cuda"
    other = torch.cuda.Stream() if on_gpu else None
    wrong = 0
    for step in range(steps):
        if other is not None:  # memory comes and goes, and is written, beside the step
            with torch.cuda.stream(other):
                for part in range(4):
                    torch.full(
                        (size.tokens * size.channels * (1 + part),), torch.nan, device="cuda"
                    )
            if step % 50 == 0:
                torch.cuda.empty_cache()
        found = gradients_of(stage, x, begin(chosen[step % len(chosen)], size))
        wrong += not all(map(torch.equal, found, expected))
    return {
        "benchmark": "recompute_memory",
        "impl": "mhc_megatron.all_policies",
        "shape": shape(size),
        "metric": "steps_with_another_bit",
        "value": wrong,
        "unit": "steps",
        "steps": steps,
        "floor": 0,
        "deterministic": not wrong,
    }
