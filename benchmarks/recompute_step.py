"""Forward and backward of a stage with attention and FFN, with and without recompute."""

import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from recompute_stage import Attention, FeedForward, Size, Stage, begin, inputs, shape
from timing import graph_times, kernel_profile
from torch import nn

from mhc_megatron.branch_norm import BranchNorm
from mhc_megatron.config import MHCConfig
from mhc_megatron.report.gpu_kinds import mhc_kernel_names


def step_lines(size: Size, repetitions: int) -> Iterator[dict[str, Any]]:
    """Forward and backward of a stage with attention and FFN, policies taking turns.

    Launched kernel by kernel, and as one CUDA graph; then the kernels of a profile.
    """
    base = MHCConfig(num_streams=size.streams)

    def branch(index: int) -> nn.Module:
        return FeedForward(size.channels) if index % 2 else Attention(size.channels)

    stage, x = Stage(size, base, branch, norm=BranchNorm), inputs(size)
    variants = {"none": base, "auto": replace(base, recompute="auto")}
    eager: dict[str, list[float]] = defaultdict(list)
    for repetition in range(repetitions + 2):  # the first two warm up
        for name, mhc in variants.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            stage(x, begin(mhc, size)).sum().backward()
            stop.record()
            stop.synchronize()
            if repetition > 1:
                eager[name].append(start.elapsed_time(stop))
    graphs: dict[str, list[float]] = defaultdict(list)
    for _ in range(4):
        for name, mhc in variants.items():
            step = graph_times(
                [lambda mhc=mhc: stage(x, begin(mhc, size)).sum().backward()],
                repetitions=repetitions,
            )
            graphs[name].append(step.median / 1e3)
    for launch, times in (("eager", eager), ("graph", graphs)):
        base_time = statistics.median(times["none"])
        for name, found in times.items():
            yield {
                "benchmark": "recompute_time",
                "impl": f"mhc_megatron.{name}",
                "shape": shape(size),
                "metric": "step",
                "value": round(statistics.median(found), 3),
                "spread": [round(min(found), 3), round(max(found), 3)],
                "unit": "ms",
                "floor": round(base_time, 3),
                "ratio_to_floor": round(statistics.median(found) / base_time, 4),
                "launch": launch,
            }
    profiles = {
        name: kernel_profile(lambda mhc=mhc: stage(x, begin(mhc, size)).sum().backward())
        for name, mhc in variants.items()
    }
    base_profile = profiles["none"]
    total = sum(base_profile.values())
    if not total:
        print("the profiler sees no kernels here: their times are left out", file=sys.stderr)
        return
    for name, profile in profiles.items():
        more = {k: round(ms - base_profile.get(k, 0.0), 3) for k, ms in profile.items()}
        yield {
            "benchmark": "recompute_time",
            "impl": f"mhc_megatron.{name}",
            "shape": shape(size),
            "metric": "step_kernels",
            "value": round(sum(profile.values()), 3),
            "unit": "ms",
            "hyper_connections": round(sum(profile.get(k, 0.0) for k in mhc_kernel_names()), 3),
            "more": {k: ms for k, ms in more.items() if abs(ms) > 0.02},
            "floor": round(total, 3),
            "ratio_to_floor": round(sum(profile.values()) / total, 4),
        }
