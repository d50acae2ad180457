"""Activations of a stage whose branches do almost nothing, under each recompute policy.

Allocated bytes are read in the backward when a state's gradient arrives, which is right after a
block's rebuild; their maximum is compared with the formula.
"""

from collections.abc import Iterator
from typing import Any

import torch
from recompute_stage import Scale, Size, Stage, begin, inputs, policies, shape

from mhc_megatron.config import MHCConfig
from mhc_megatron.pipeline.blocks import peak_width


def memory_lines(size: Size) -> Iterator[dict[str, Any]]:
    """Activations under each policy, and the peak of the whole step, gradients included."""
    base, n = MHCConfig(num_streams=size.streams), size.streams
    stage, x = Stage(size, base, lambda index: Scale(size.channels)), inputs(size)
    unit = x.numel() // n * x.element_size()
    # Not in the formula: a sublayer's branch output, and float32 coefficients, logits and RMS.
    constant = unit + size.tokens * 4 * (2 * n * (n + 2) + 2)
    samples: list[int] = []
    before = 0

    def sample(index: int) -> None:
        # The gradients of the state and of the next branch's input have arrived; the loss's is one
        # number.
        gradients = (n + 1) * unit if index + 1 < size.sublayers else 0
        held = torch.cuda.memory_allocated() - before - gradients - (index + 1) * constant
        samples.append(held + x.numel() * x.element_size())  # the first state was there before

    for name, mhc in policies(base, size).items():
        block = mhc.block_of(size.sublayers)
        stage(x, begin(mhc, size)).sum().backward()  # parameters' gradients exist from here on
        torch.cuda.synchronize()
        samples.clear()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        stage(x, begin(mhc, size), sample).sum().backward()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        floor = unit * peak_width(num_sublayers=size.sublayers, num_streams=n, block=block)
        for metric, value, limit in (
            ("activations", max(samples), floor),
            ("step_peak", peak, floor + size.sublayers * constant),
        ):
            yield {
                "benchmark": "recompute_memory",
                "impl": f"mhc_megatron.{name}",
                "shape": {**shape(size), "block": block},
                "metric": metric,
                "value": value,
                "unit": "bytes",
                "floor": limit,
                "ratio_to_floor": round(value / limit, 4),
            }
