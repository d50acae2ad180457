"""Between phases on different lanes gradients come back through a boundary only.

Autograd lets the stream of a node wait for its gradient as soon as that is made. A gradient that
goes past the boundaries makes its lane wait for the one on which it was made, long before the plan
needs it, and whatever the other micro-batch has enqueued there waits with it.
"""

from typing import Any

import pytest
import torch
from helpers import layouts
from helpers.oracle import DENSE, FLEX, FLEX_LAYOUT, MOE, run_config
from helpers.pool import WorkerPool
from megatron.core import __version__ as core_version
from packaging.version import Version

from mhc_megatron.config import MHCConfig
from mhc_megatron.launch.environment import World
from mhc_megatron.megatron.chain import chain_of
from mhc_megatron.megatron.chunk_phases import mark_phases
from mhc_megatron.megatron.phases import Lanes
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.model import build_chunks, transformer_config
from mhc_megatron.training.runtime import distributed_runtime

TENSOR = {"tensor": 2}
# name: (model, layout, phases of a layer)
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "dense": (DENSE, {}, 4),
    "dense_tp2": (DENSE, TENSOR, 8),
    "dense_tp2_sp": (DENSE, {**TENSOR, "sequence": True}, 8),
}
if Version(core_version) >= Version("0.17"):  # test_layouts.py: older ones refuse it without TE
    MODELS |= {
        "experts": (MOE, {}, 8),
        "experts_tp2_sp": (MOE, {**TENSOR, "sequence": True}, 10),
        "experts_flex": (FLEX, FLEX_LAYOUT, 8),
    }


def edges_between_lanes(rank: int, world_size: int, config: TrainConfig) -> tuple[int, list[str]]:
    """A job: how many boundaries a forward's graph has, and what goes past them, as ``a -> b``."""
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        megatron_config = transformer_config(config)
        if config.model.num_moe_experts is not None:
            megatron_config.moe_shared_expert_intermediate_size = 32
        [chunk] = build_chunks(config, megatron_config, vocab_size=layouts.VOCAB)
        mark_phases(chunk, Lanes(torch.device("cpu")), "all", ends_model=True)
        marker = chain_of(chunk).marker
        batch = layouts.sample(0, config.model.seq_length)
        marker.start()
        losses = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        nodes = _graph(losses.grad_fn)
    begins = sorted(n._sequence_nr() for n in nodes if _is_boundary(n))

    def phase(node: Any) -> Any:
        return marker.phases[sum(begin < node._sequence_nr() for begin in begins)]

    past = set()
    for node in nodes:
        for other in _before(node):
            if _is_boundary(node) or _is_boundary(other) or "AccumulateGrad" in other.name():
                continue
            if phase(node).lane is not phase(other).lane:
                past.add(f"{phase(node)} -> {phase(other)}")
    return len(begins), sorted(past)


def _graph(last: Any) -> list[Any]:
    found, left = {last}, [last]
    while left:
        new = [node for node in _before(left.pop()) if node not in found]
        found.update(new)
        left += new
    return list(found)


def _before(node: Any) -> list[Any]:
    return [other for other, _ in node.next_functions if other is not None]


def _is_boundary(node: Any) -> bool:
    return "_Boundary" in node.name()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("model", MODELS)
def test_no_gradient_goes_past_the_boundaries(
    model: str, backend: Any, request: pytest.FixtureRequest
) -> None:
    mhc = MHCConfig(recompute="block", recompute_block=4, sinkhorn_iterations=2, backend=backend)
    options, layout, phases_of_a_layer = MODELS[model]
    flex = options is FLEX
    workers: WorkerPool = request.getfixturevalue("deep_ep_workers" if flex else "workers")
    config = run_config(options, layout, mhc=mhc, dtype="bf16" if flex else "fp32")
    for found in workers.run(edges_between_lanes, config.parallel.world_size, config):
        assert found == (8 * phases_of_a_layer + 1, [])  # the loss's is the last
