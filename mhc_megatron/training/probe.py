"""Looking at the residual mappings of a model that is spread over ranks."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core import parallel_state
from torch import Tensor

from mhc_megatron.hyper_connection import HyperConnection, mappings_to


@dataclass(frozen=True, kw_only=True)
class Mappings:
    """Token-averaged residual mappings of a whole model.

    Attributes:
        names: ``0.attention``, ``0.mlp``, ``1.attention``, ... in depth order.
        res: H_res, [L, n, n] float64 on the CPU.
    """

    names: list[str]
    res: Tensor


class MappingProbe:
    """Token means of H_res per sublayer, over every forward pass while the probe is open."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._tokens: dict[int, int] = {}

    def record(self, sublayer: int, mapping: Tensor) -> None:
        """Add one micro-batch of mappings [..., n, n]."""
        flat = mapping.flatten(0, -3).to(torch.float64)
        self._sums[sublayer] = self._sums.get(sublayer, 0) + flat.sum(0)
        self._tokens[sublayer] = self._tokens.get(sublayer, 0) + flat.shape[0]

    def gather(self) -> Mappings:
        """The whole model's mappings, on every rank.

        Every rank of a DP, CP or TP group sees equally many tokens, so the mean of their means is
        the mean over all tokens.
        """
        groups = [parallel_state.get_data_parallel_group(with_context_parallel=True)]
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            groups.append(parallel_state.get_tensor_model_parallel_group())
        local: dict[int, Tensor] = {}
        for sublayer in sorted(self._sums):
            mean = self._sums[sublayer] / self._tokens[sublayer]
            for group in groups:
                torch.distributed.all_reduce(mean, group=group)
                mean /= torch.distributed.get_world_size(group)
            local[sublayer] = mean.cpu()
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        stages: list[dict[int, Tensor]] = [{}] * torch.distributed.get_world_size(pipeline)
        torch.distributed.all_gather_object(stages, local, group=pipeline)
        merged = {sublayer: mean for stage in stages for sublayer, mean in stage.items()}
        order = sorted(merged)
        return Mappings(
            names=[
                f"{sublayer // 2}.{'mlp' if sublayer % 2 else 'attention'}" for sublayer in order
            ],
            res=torch.stack([merged[sublayer] for sublayer in order]),
        )


@contextlib.contextmanager
def probe_mappings(chunks: list[torch.nn.Module]) -> Iterator[MappingProbe]:
    """Record H_res of every hyper-connection in the chunks until the context closes."""
    probe = MappingProbe()
    connections = [c for chunk in chunks for c in hyper_connections(chunk)]
    observe(connections, probe)
    try:
        yield probe
    finally:
        observe(connections, None)


def hyper_connections(chunk: torch.nn.Module) -> list[HyperConnection]:
    """Every hyper-connection of a model chunk."""
    return [module for module in chunk.modules() if isinstance(module, HyperConnection)]


def observe(connections: list[HyperConnection], probe: MappingProbe | None) -> None:
    """From now on, let the hyper-connections hand their mappings to ``probe``, or to nobody."""
    for connection in connections:
        record = None if probe is None else partial(probe.record, connection.sublayer)
        connection.observer = None if record is None else mappings_to(record)
