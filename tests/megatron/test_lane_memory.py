"""Whatever a phase reads of another lane's memory has been recorded on its own lane.

The allocator gives memory back to the lane that made it, which another lane may still be reading:
no event between lanes keeps it from that. On a CPU there is one lane and nothing is recorded, so
the phases say which lane it would be, and every operator of a forward is looked at.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import layouts
from helpers.oracle import DENSE, FLEX, FLEX_LAYOUT, MOE, run_config
from helpers.pool import WorkerPool
from megatron.core import __version__ as core_version
from packaging.version import Version
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mhc_megatron.config import MHCConfig
from mhc_megatron.launch.environment import World
from mhc_megatron.megatron.chain import chain_of
from mhc_megatron.megatron.chunk_phases import mark_phases
from mhc_megatron.megatron.phased_moe import Keeper
from mhc_megatron.megatron.phases import Lanes
from mhc_megatron.pipeline.phases import Lane
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.model import build_chunks, transformer_config
from mhc_megatron.training.runtime import distributed_runtime


class NotedLanes(Lanes):
    """Notes what is recorded on which lane."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.recorded: set[tuple[Lane, int]] = set()

    def enter(self, lane: Lane, ended: Any, tensors: Sequence[Tensor | None]) -> None:
        self.recorded |= {(lane, _memory(tensor)) for tensor in tensors if tensor is not None}

    def record(self, lane: Lane, tensor: Tensor) -> None:
        self.recorded.add((lane, _memory(tensor)))


class Reads(TorchDispatchMode):
    """Notes what is read of another lane's memory without a record."""

    def __init__(self, marker: Any, lanes: NotedLanes) -> None:
        super().__init__()
        self.marker, self.lanes = marker, lanes
        # None for what no phase made: parameters and data. Held, so that no memory is met twice.
        self.made: dict[int, tuple[Lane | None, Tensor]] = {}
        self.found: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        phase = self.marker.phases[self.marker._at]
        for tensor in _tensors((args, kwargs)):
            lane, _ = self.made.setdefault(_memory(tensor), (None, tensor))
            recorded = (phase.lane, _memory(tensor)) in self.lanes.recorded
            if lane not in (None, phase.lane) and not recorded and _reads(function, tensor):
                self.found.add(f"{phase.name}: {function}")
        output = function(*args, **(kwargs or {}))
        for tensor in _tensors(output):
            self.made.setdefault(_memory(tensor), (phase.lane, tensor))
        return output


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _reads(function: Any, tensor: Tensor) -> bool:
    """Not a view, which a boundary makes; and not a count, which on a GPU the host has by then."""
    return not function.is_view and tensor.dim() > 0


def _tensors(nested: Any) -> list[Tensor]:
    leaves = tree_flatten(nested)[0]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def unrecorded(rank: int, world_size: int, config: TrainConfig, forget: bool) -> list[str]:
    """A job: what a forward reads of other lanes unrecorded. ``forget`` is the mutation."""
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        megatron_config = transformer_config(config)
        if config.model.num_moe_experts is not None:
            megatron_config.moe_shared_expert_intermediate_size = 32
        [chunk] = build_chunks(config, megatron_config, vocab_size=layouts.VOCAB)
        lanes = NotedLanes()
        mark_phases(chunk, lanes, "all", ends_model=True)
        marker = chain_of(chunk).marker
        read_in = Keeper.read_in
        if forget:
            Keeper.read_in = lambda self, phase: ()  # type: ignore[method-assign]
        try:
            batch = layouts.sample(0, config.model.seq_length)
            with Reads(marker, lanes) as reads:
                marker.start()
                chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        finally:
            Keeper.read_in = read_in  # type: ignore[method-assign]
    return sorted(reads.found)


MHC = MHCConfig(recompute="block", recompute_block=4, sinkhorn_iterations=2)
# name: (model, layout, phases that read another lane's once a dispatcher's own are forgotten)
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {"dense": (DENSE, {}, set())}
if Version(core_version) >= Version("0.17"):  # test_layouts.py: older ones refuse it without TE
    MODELS |= {
        "experts": (MOE, {"data": 2, "expert": 2}, {"unpermute"}),
        "padded_experts": (
            {**MOE, "moe_expert_capacity_factor": 0.75},
            {"data": 2, "expert": 2},
            {"unpermute"},
        ),
        "experts_flex": (FLEX, FLEX_LAYOUT, {"dispatch", "experts"}),
    }


@pytest.mark.parametrize("model", MODELS)
def test_no_phase_reads_what_is_not_recorded(model: str, request: pytest.FixtureRequest) -> None:
    options, layout, mutated = MODELS[model]
    flex = options is FLEX
    workers: WorkerPool = request.getfixturevalue("deep_ep_workers" if flex else "workers")
    config = run_config(options, layout, mhc=MHC, dtype="bf16" if flex else "fp32")
    for forget, expected in ((False, set()), (True, mutated)):
        for found in workers.run(unrecorded, config.parallel.world_size, config, forget):
            assert {line.split(":")[0] for line in found} == expected, found
