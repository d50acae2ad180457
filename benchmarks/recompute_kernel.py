"""The kernel that rebuilds a block, against its least bytes at the bandwidth of a copy.

Alone; with the branches' norms, which it applies to those that a hyper-connection normalised; and
followed by the norms of any other kind, which run again one by one.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from recompute_stage import Size, inputs, shape
from timing import graph_times
from torch import Tensor

from mhc_megatron import kernels
from mhc_megatron.branch_norm import BranchNorm
from mhc_megatron.config import MHCConfig
from mhc_megatron.hyper_connection import HyperConnection

KERNEL_BLOCKS = (1, 2, 4, 6, 8)
VARIANTS = ("rebuild", "rebuild with norms", "rebuild, then norms")

Call = Callable[[], list[Tensor]]


def kernel_lines(size: Size, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Each variant by CUDA-graph replay, over three sets of operands.

    Args:
        size: tokens, channels and streams; the blocks are ``KERNEL_BLOCKS``.
        bandwidth: of a copy, bytes per second.
    """
    for block in KERNEL_BLOCKS:
        for variant in VARIANTS:
            floor = least_bytes(size, block, variant) / bandwidth * 1e6
            times = graph_times([rebuild_call(size, block, seed, variant) for seed in range(3)])
            yield {
                "benchmark": "recompute_time",
                "impl": f"mhc_megatron.{variant}",
                "shape": {**shape(size), "L": block},
                "metric": "rebuild",
                "value": round(times.median, 2),
                "spread": [round(times.least, 2), round(times.most, 2)],
                "unit": "us",
                "floor": round(floor, 2),
                "ratio_to_floor": round(times.median / floor, 3),
                "launch": "graph",
            }


def least_bytes(size: Size, block: int, variant: str) -> int:
    """What a variant has to read and write for a block of bf16."""
    n, channels = size.streams, size.channels
    elements = n * block + 2 * block - 1  # read x, f; write x' and u
    numbers = n * (n + 2) * block - n * (n + 1)  # of float32; the last H_post and H_res are unused
    if variant == "rebuild with norms":
        numbers += block  # 1/RMS
    if variant == "rebuild, then norms":
        elements += 2 * block  # read u, write it normalised
    return size.tokens * (2 * channels * elements + 4 * numbers)


def rebuild_call(size: Size, block: int, seed: int, variant: str) -> Call:
    """A variant with operands of its own, each sublayer's coefficients among them.

    Returns:
        What runs it and returns the branches' inputs, normalised unless it is the kernel alone.
    """
    n, channels = size.streams, size.channels
    x = inputs(size, seed).detach().unflatten(-1, (n, -1))
    mhc = MHCConfig(num_streams=n, backend="triton")
    connection = HyperConnection(mhc, hidden_size=channels, sublayer=0)
    norm = BranchNorm(channels, eps=1e-5).to(size.device, x.dtype)
    inside = norm if variant == "rebuild with norms" else None
    with torch.no_grad():
        _, mix = connection.to(size.device).pre(x.flatten(-2), norm=inside)
    assert isinstance(mix, kernels.PackedMappings)
    mixes = [_copy(mix) for _ in range(block)]
    branches = [torch.randn_like(x[..., 0, :]) for _ in range(block - 1)]
    weights = [None if inside is None else norm.weight.data] * block
    out = kernels.rebuild(x, branches, mixes, norm_weights=weights, backend="triton")
    normed = [torch.empty_like(u) for u in out.branch_inputs]

    @torch.no_grad()
    def call() -> list[Tensor]:
        kernels.rebuild(x, branches, mixes, norm_weights=weights, out=out, backend="triton")
        if variant != "rebuild, then norms":
            return out.branch_inputs
        for target, u in zip(normed, out.branch_inputs, strict=True):
            target.copy_(norm(u))
        return normed

    return call


def _copy(mix: kernels.PackedMappings) -> kernels.PackedMappings:
    rms = mix.inverse_rms
    return kernels.PackedMappings(
        mix.packed.clone(),
        mix.num_streams,
        mix.tokens,
        inverse_rms=None if rms is None else rms.clone(),
    )
