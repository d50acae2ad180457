"""Where tensor parallelism's collectives run in an overlapped stage: on the communication lane."""

import random
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import layouts
from helpers.oracle import DENSE, run_config
from helpers.plans import random_plan
from helpers.pool import WorkerPool
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mhc_megatron.config import MHCConfig
from mhc_megatron.launch.environment import World
from mhc_megatron.megatron.chain import chain_of
from mhc_megatron.megatron.chunk_phases import mark_phases
from mhc_megatron.megatron.overlap import LaneOverlap, PhasedStage
from mhc_megatron.megatron.phased_tensor import take_collectives
from mhc_megatron.megatron.phases import Lanes
from mhc_megatron.megatron.split_linear import split_linears
from mhc_megatron.pipeline.phases import Lane, Step
from mhc_megatron.pipeline.stage import AutogradStage
from mhc_megatron.pipeline.turns import Thread, Turns
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.model import build_chunks, transformer_config
from mhc_megatron.training.runtime import distributed_runtime

LAYERS, PLANS = 8, 4
MHC = MHCConfig(recompute="block", recompute_block=4, sinkhorn_iterations=2)
WHOLE = {"tensor": 2}
SEQUENCE = {"tensor": 2, "sequence": True}


class Chunk:
    """The whole model of a run as one stage, whose linear layers are split."""

    def __init__(self, config: TrainConfig, *, bias: bool = False) -> None:
        self.config = config
        megatron_config = transformer_config(config)
        megatron_config.add_bias_linear = bias
        [self.module] = build_chunks(config, megatron_config, vocab_size=layouts.VOCAB)
        layouts.randomise([self.module], seed=3)
        split_linears(self.module)

    def mark(self) -> Any:
        mark_phases(self.module, Lanes(torch.device("cpu")), "all", ends_model=True)
        return chain_of(self.module).marker

    def loss(self, mb: int, _: Tensor | None = None) -> Tensor:
        marker = chain_of(self.module).marker
        if marker is not None:
            marker.start()
        batch = layouts.sample(mb, self.config.model.seq_length)
        losses = self.module(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        loss: Tensor = losses.mean()
        if marker is not None:
            marker.end(loss)
        return loss

    def gradients(self) -> dict[str, Tensor]:
        """Of all parameters, which then have none."""
        found = {name: p.grad for name, p in self.module.named_parameters()}
        self.module.zero_grad()
        return found


class Watch(TorchDispatchMode):
    """Notes which collective is called in which phase."""

    def __init__(self, marker: Any) -> None:
        super().__init__()
        self.marker, self.place = marker, -1
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function.namespace == "c10d":
            place = self.marker._at if self.place < 0 else self.place
            phase = self.marker.phases[place]
            name = function._schema.name.removeprefix("c10d::").strip("_")
            self.found.append(f"{phase} on {phase.lane.value}: {name}")
        return function(*args, **(kwargs or {}))


def reduce_by_itself(chunk: torch.nn.Module) -> None:
    """The mutation: a row-parallel layer that sums over ranks where it is."""
    chunk.decoder.layers[1].mlp.linear_fc2.explicit_expert_comm = False


def collectives(
    rank: int, world_size: int, config: TrainConfig, spoil: Any = None
) -> dict[str, list[str]]:
    """A job: what a forward and a backward call, phase by phase, between the model's ends."""
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        chunk = Chunk(config)
        marker = chunk.mark()
        if spoil is not None:
            spoil(chunk.module)
        called = {}
        with Watch(marker) as watch:
            loss = chunk.loss(0)
        called["forward"] = watch.found
        with Watch(marker) as watch:
            watch.place = len(marker.phases) - 1
            marker.reached = lambda place: setattr(watch, "place", place)
            loss.backward()
        called["backward"] = watch.found
    ends = ("enter on", "leave on")
    return {way: [c for c in found if not c.startswith(ends)] for way, found in called.items()}


ON = f"on {Lane.COMMUNICATION.value}"
EXPECTED: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "sequence": (
        SEQUENCE,
        [
            f"attention_gather {ON}: allgather_base",
            f"attention_scatter {ON}: reduce_scatter_base",
            f"mlp_gather {ON}: allgather_base",
            f"mlp_scatter {ON}: reduce_scatter_base",
        ],
        [  # of the gradients, then of the input of the products before
            f"mlp_scatter {ON}: allgather_base",
            f"mlp_scatter {ON}: allgather_base",
            f"mlp_gather {ON}: reduce_scatter_base",
            f"attention_scatter {ON}: allgather_base",
            f"attention_scatter {ON}: allgather_base",
            f"attention_gather {ON}: reduce_scatter_base",
        ],
    ),
    "whole": (
        WHOLE,
        [f"attention_reduce {ON}: allreduce", f"mlp_reduce {ON}: allreduce"],
        [f"mlp_copy {ON}: allreduce", f"attention_copy {ON}: allreduce"],
    ),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_collectives_are_phases_of_the_communication_lane(kind: str, workers: WorkerPool) -> None:
    layout, forward, backward = EXPECTED[kind]
    found = workers.run(collectives, 2, run_config(DENSE, layout, mhc=MHC))
    expected = {
        "forward": [f"{layer}.{call}" for layer in range(LAYERS) for call in forward],
        "backward": [f"{layer}.{call}" for layer in reversed(range(LAYERS)) for call in backward],
    }
    assert found == [expected, expected]


def test_a_collective_on_the_compute_lane_is_found(workers: WorkerPool) -> None:
    config = run_config(DENSE, WHOLE, mhc=MHC)
    for found in workers.run(collectives, 2, config, reduce_by_itself):
        assert "1.mlp on compute: allreduce" in found["forward"]


def kept_and_deferred(
    rank: int, world_size: int, config: TrainConfig
) -> tuple[list[int], list[int], list[str], list[str]]:
    """A job: bytes of the products' inputs after F and after I; weights with a gradient after I.

    At last those without one after W.
    """
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        chunk = Chunk(config)
        marker = chunk.mark()
        nodes: list[Any] = []

        def loss(mb: int, x: Tensor | None) -> Tensor:
            output = chunk.loss(mb, x)
            nodes.extend(_weight_paths(output.grad_fn))
            return output

        stage = PhasedStage(loss, marker, take_dropped=None)
        stage.forward(0, None)
        after_forward = _bytes(nodes)
        stage.backward(0, None, defer_weights=True)
        after_backward = _bytes(nodes)
        weights = {
            name: parameter
            for name, parameter in chunk.module.named_parameters()
            if "linear" in name and parameter.dim() > 1
        }
        early = [name for name, parameter in weights.items() if parameter.grad is not None]
        nodes.clear()
        stage.weights(0)
        missing = [name for name, parameter in weights.items() if parameter.grad is None]
        return after_forward, after_backward, early, missing


def _weight_paths(last: Any) -> list[Any]:
    found, left = {last}, [last]
    while left:
        new = {other for other, _ in left.pop().next_functions if other is not None} - found
        found |= new
        left += new
    return [node for node in found if "_WeightPath" in node.name()]


def _bytes(nodes: list[Any]) -> list[int]:
    return sorted(node.saved_tensors[0].untyped_storage().nbytes() for node in nodes)


def test_gathered_sequences_are_dropped_and_weight_gradients_wait(workers: WorkerPool) -> None:
    config = run_config(DENSE, SEQUENCE, mhc=MHC)
    model = config.model
    gathered = 4 * model.seq_length * model.hidden_size
    for forward, backward, early, missing in workers.run(kept_and_deferred, 2, config):
        assert forward.count(0) == 2 * LAYERS, "of the products after a gather"
        assert backward == sorted(size or gathered for size in forward)
        assert early == missing == []


class Late(Turns):
    """Holds up every step, on each rank as long as chance says."""

    chance = random.Random()

    def next(self, thread: Thread) -> Step:
        time.sleep(self.chance.random() * 1e-3)
        return super().next(thread)


def differences_of_plans(
    rank: int, world_size: int, config: TrainConfig, bias: bool, seeds: int
) -> dict[int, list[str]]:
    """A job: by seed of a random plan, whose gradients differ from those of one after the other."""
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        chunk = Chunk(config, bias=bias)
        stage = AutogradStage(chunk.loss)
        losses = [stage.forward(mb, None) for mb in range(2)]
        for mb in range(2):
            stage.backward(mb, None, defer_weights=True)
            stage.weights(mb)
        expected = chunk.gradients()
        assert all(gradient.any() for gradient in expected.values())
        assert bias == any(name.endswith("linear_qkv.bias") for name in expected)
        marker = chunk.mark()
        phased = PhasedStage(chunk.loss, marker, take_dropped=None)
        Late.chance.seed(rank)
        found = {}
        for seed in range(seeds):
            outputs = [phased.forward(0, None)]
            LaneOverlap(marker.lanes, random_plan(seed), Late)(
                (phased, 1, None), (phased, 0, None), outputs.append, lambda _: None
            )
            phased.backward(1, None, defer_weights=True)
            phased.weights(1)
            own = chunk.gradients()
            assert own.keys() == expected.keys()
            found[seed] = [name for name in own if not torch.equal(own[name], expected[name])]
            found[seed] += ["loss"] * (outputs != losses)
            found[seed] += ["unfinished"] * len(phased.unfinished)
    return found


@pytest.mark.parametrize(
    ("layout", "bias"),
    # With a bias inside the product its weight gradient stays beside the input's.
    [(SEQUENCE, False), (SEQUENCE, True), (WHOLE, False)],
    ids=["sequence", "sequence_bias", "whole"],
)
def test_any_plan_gives_the_same_bits_however_late_a_rank_is(
    layout: dict[str, Any], bias: bool, workers: WorkerPool
) -> None:
    config = run_config(DENSE, layout, mhc=MHC)
    for found in workers.run(differences_of_plans, 2, config, bias, PLANS):
        assert found == {seed: [] for seed in range(PLANS)}


def attention_of(module: type[nn.Module]) -> SelfAttention:
    attention = SelfAttention.__new__(SelfAttention)
    nn.Module.__init__(attention)
    attention.linear_qkv = attention.linear_proj = module(2, 2)
    return attention


@pytest.mark.parametrize(
    ("branch", "inside"),
    [
        (attention_of(nn.Linear), "SelfAttention of Linear and Linear"),
        (nn.Identity(), "Identity of NoneType and NoneType"),
    ],
)
def test_modules_that_are_not_megatrons_own_keep_theirs(
    branch: Any, inside: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = SimpleNamespace(tensor_model_parallel_size=2)
    layers = [SimpleNamespace(config=config, self_attention=branch, is_moe_layer=True)]
    with caplog.at_level("INFO"):
        assert take_collectives(layers, Lanes(torch.device("cpu"))) is None
    assert caplog.messages == [
        f"tensor parallelism's collectives stay on the compute lane, inside {inside}"
    ]
