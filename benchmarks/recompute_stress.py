"""Bits of many steps under every policy while memory is short and taken by others.

``stress_line`` has a stage on one stream, recompute_lanes.py one on the lanes of an overlap.
"""

from collections.abc import Callable
from typing import Any

import torch
from allocator_pressure import Pressure, Thief, allocation_retries
from recompute_stage import FeedForward, Size, Stage, begin, inputs, policies, shape
from torch import Tensor

from mhc_megatron.branch_norm import BranchNorm
from mhc_megatron.config import MHCConfig
from mhc_megatron.hyper_connection import HyperConnection
from mhc_megatron.recompute import ForwardRecompute

Run = Callable[[], list[Tensor]]


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
    device = torch.device(size.device)
    thief = Thief(device, [None, *([torch.cuda.Stream()] if device.type == "cuda" else [])])
    watch(stage, thief)

    def case(mhc: MHCConfig) -> Callable[[], Run]:
        return lambda: lambda: gradients_of(stage, x, begin(mhc, size, thief.observe))

    cases = {name: case(mhc) for name, mhc in policies(base, size).items()}
    return {
        "benchmark": "recompute_memory",
        "impl": "mhc_megatron.all_policies",
        "shape": shape(size),
        **steps_with_another_bit(cases, expected, thief, steps),
    }


def watch(module: torch.nn.Module, thief: Thief) -> None:
    """The thief acts before every kernel of the hyper-connections' forward."""
    for part in module.modules():
        if isinstance(part, HyperConnection):
            part.observer = thief.observe


def steps_with_another_bit(
    cases: dict[str, Callable[[], Run]], expected: list[Tensor], thief: Thief, steps: int
) -> dict[str, Any]:
    """The figures of a stress line: the cases take turns.

    Args:
        cases: by name, what makes what runs a step and returns its tensors.
        expected: those tensors.
        thief: of the cases' observers.
        steps: in all.
    """
    pressed = {name: Pressure(make, thief) for name, make in cases.items()}
    before = allocation_retries()
    wrong = dict.fromkeys(cases, 0)
    names = list(cases)
    for step in range(steps):
        name = names[step % len(names)]
        found = pressed[name]()
        wrong[name] += len(found) != len(expected) or not all(map(torch.equal, found, expected))
        del found  # the next case's peak was measured without
    total = sum(wrong.values())
    return {
        "metric": "steps_with_another_bit",
        "value": total,
        "unit": "steps",
        "steps": steps,
        "floor": 0,
        "deterministic": not total,
        "wrong_cases": {name: count for name, count in wrong.items() if count},
        "cases": names,
        "margin": round(max(one.margin for one in pressed.values()), 2),
        "alloc_retries": allocation_retries() - before,
        "out_of_memory": sum(one.out_of_memory for one in pressed.values()),
        "refused": thief.refused,
    }
