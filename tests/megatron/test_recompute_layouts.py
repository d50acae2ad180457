"""Every policy has the bits of ``none`` in every layout: all losses, all gradients, on all ranks.

Compared within the layout, so that no sum has another order. That its ``none`` equals the single
process is for test_layouts.py and test_schedules.py.
"""

import dataclasses
from typing import Any

import pytest
import torch
from helpers import layouts
from helpers.oracle import MODELS
from helpers.pool import WorkerPool
from megatron.core import __version__ as core_version
from packaging.version import Version

from mhc_megatron import recompute
from mhc_megatron.config import MHCConfig
from mhc_megatron.hyper_connection import Mix
from mhc_megatron.launch.environment import World
from mhc_megatron.megatron.chain import chain_of
from mhc_megatron.training.config import ModelConfig, ParallelConfig, TrainConfig
from mhc_megatron.training.model import build_chunks, transformer_config, wrap_data_parallel
from mhc_megatron.training.pipeline import forward_backward_func
from mhc_megatron.training.runtime import distributed_runtime
from mhc_megatron.training.step import run_step

# Blocks of three end inside a layer, and the last may be shorter.
LAYERS_OF_A_STAGE = 2
POLICIES: dict[str, dict[str, Any]] = {
    "none": {},
    "auto": {"recompute": "auto"},
    "block": {"recompute": "block", "recompute_block": 3},
    "stage": {"recompute": "stage"},
}
# By the sublayers of a stage.
BLOCKS = {
    "auto": {4: [2, 2], 6: [2, 2, 2]},
    "block": {4: [3, 1], 6: [3, 3]},
    "stage": {4: [4], 6: [6]},
}
NUM_MB = 4  # of a replica

SP = {"tensor": 2, "sequence": True}
# name: (model, layout, what else)
LAYOUTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "core_attn": ("dense", {}, {"recompute": "core_attn"}),
    "tp2": ("dense", {"tensor": 2}, {}),
    "tp2_sp": ("dense", SP, {}),
    "dp2_distributed_optimizer": ("dense", {"data": 2, "distributed_optimizer": True}, {}),
    "pp2": ("dense", {"pipeline": 2}, {}),
    "pp2_uneven": ("dense", {"pipeline": 2, "first_stage_layers": 3}, {}),
    "tp2_sp_pp2": ("dense", {**SP, "pipeline": 2}, {}),
    "pp4_vpp2": ("dense", {"pipeline": 4, "virtual": 2}, {}),
    "pp2_zb_h1": ("dense", {"pipeline": 2, "schedule": "zb_h1"}, {}),
    "pp2_dualpipe_v": ("dense", {"pipeline": 2, "schedule": "dualpipe_v"}, {}),
    "pp2_dualpipe": ("dense", {"pipeline": 2, "schedule": "dualpipe"}, {}),
    "tp2_sp_pp2_dualpipe_v": ("dense", {**SP, "pipeline": 2, "schedule": "dualpipe_v"}, {}),
    "mtp": ("mtp", {}, {}),
    "pp2_mtp": ("mtp", {"pipeline": 2}, {}),
    "tp2_sp_mtp": ("mtp", SP, {}),
    "pp2_dualpipe_v_bf16": (
        "dense",
        {"pipeline": 2, "schedule": "dualpipe_v", "distributed_optimizer": True},
        {"dtype": "bf16"},
    ),
}
if Version(core_version) >= Version("0.17"):  # test_layouts.py: older ones refuse it without TE
    EXPERTS = {"data": 2, "expert": 2}
    LAYOUTS |= {
        "moe_ep2": ("moe", EXPERTS, {}),
        "moe_tp2_sp": ("moe", SP, {}),
        "moe_pp2_dualpipe_v": ("moe", {"pipeline": 2, "schedule": "dualpipe_v"}, {}),
        "moe_ep2_pp2_dualpipe": ("moe", {**EXPERTS, "pipeline": 2, "schedule": "dualpipe"}, {}),
    }


def run_config(name: str) -> TrainConfig:
    model, layout, options = LAYOUTS[name]
    parallel = ParallelConfig(**layout)
    others = LAYERS_OF_A_STAGE * (parallel.num_stages - 1)
    return TrainConfig(
        model=ModelConfig(
            num_layers=others + (parallel.first_stage_layers or LAYERS_OF_A_STAGE),
            hidden_size=16,
            num_attention_heads=2,
            ffn_hidden_size=32,
            seq_length=8,
            **MODELS[model],
        ),
        mhc=MHCConfig(sinkhorn_iterations=3),
        parallel=parallel,
        micro_batch_size=1,
        global_batch_size=NUM_MB * parallel.data,
        **options,
    )


class Step:
    """Of one rank: its loss, its gradients by name, and the lengths of every chunk's blocks."""

    def __init__(self, config: TrainConfig, initial: dict[str, torch.Tensor]) -> None:
        megatron_config = transformer_config(config)
        chunks = build_chunks(config, megatron_config, vocab_size=layouts.VOCAB)
        layouts.randomise(chunks, seed=7)
        named = [
            (f"{index}.{name}", parameter)
            for index, chunk in enumerate(chunks)
            for name, parameter in chunk.named_parameters()
        ]
        for name, parameter in named:
            parameter.data.copy_(initial.setdefault(name, parameter.detach().clone()))
        recomputes = [chain.recompute for chain in map(chain_of, chunks) if chain is not None]
        self.blocks = [[len(block) for block in r.plan] for r in recomputes if r is not None]
        wrapped = wrap_data_parallel(config, megatron_config, chunks)
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        function = forward_backward_func(config, megatron_config)
        batches = layouts.micro_batches(config, step=0)
        self.loss = run_step(config, function, wrapped, batches)
        self.gradients = {name: parameter.main_grad.clone() for name, parameter in named}

    def differences(self, other: "Step") -> list[str]:
        """Names of what has other bits."""
        same = self.gradients.keys() == other.gradients.keys()
        found = [] if same else ["names"]
        found += ["loss"] if self.loss != other.loss else []
        return found + [
            name
            for name, gradient in self.gradients.items()
            if not torch.equal(gradient, other.gradients[name])
        ]


def policies_in_a_layout(
    rank: int,
    world_size: int,
    config: TrainConfig,
    policies: dict[str, MHCConfig],
    spoiled: str | None = None,
) -> dict[str, Any]:
    """Per policy: the lengths of the blocks, and what differs from the first policy's.

    The coefficients that the policy ``spoiled`` keeps are wrong.
    """
    steps: dict[str, Step] = {}
    keep = recompute._without_graph
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        initial: dict[str, torch.Tensor] = {}
        for name, mhc in policies.items():
            if name == spoiled:
                recompute._without_graph = lambda mix: wrong(keep(mix))
            try:
                steps[name] = Step(dataclasses.replace(config, mhc=mhc), initial)
            finally:
                recompute._without_graph = keep
    expected = next(iter(steps.values()))
    found: dict[str, Any] = {
        name: (step.blocks, step.differences(expected)) for name, step in steps.items()
    }
    found["vanished"] = [
        name
        for name, gradient in expected.gradients.items()
        if "hyper_connection" in name and not gradient.abs().sum() > 0
    ]
    return found


def wrong(mix: Mix) -> Mix:
    """Of the reference: one coefficient of a token's is another."""
    res = mix.res.clone()
    res[..., 0, 0] *= 1.5
    return mix._replace(res=res)


def check(ranks: list[dict[str, Any]], policies: dict[str, MHCConfig]) -> None:
    """Every rank's chunks were cut as they should be, and have the bits of ``none``."""
    for found in ranks:
        assert found.pop("vanished") == []
        assert found.keys() == policies.keys()
        assert found.pop("none") == ([], [])
        for name, (chunks, differences) in found.items():
            assert chunks and all(blocks == BLOCKS[name][sum(blocks)] for blocks in chunks), chunks
            assert differences == [], (name, differences)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_policy_has_the_bits_of_none(name: str, workers: WorkerPool) -> None:
    config = run_config(name)
    policies = {p: dataclasses.replace(config.mhc, **given) for p, given in POLICIES.items()}
    ranks = workers.run(policies_in_a_layout, config.parallel.world_size, config, policies)
    check(ranks, policies)


def test_a_wrong_coefficient_is_found_on_every_rank(workers: WorkerPool) -> None:
    config = run_config("pp2_dualpipe_v")
    policies = {p: dataclasses.replace(config.mhc, **POLICIES[p]) for p in ("none", "block")}
    ranks = workers.run(policies_in_a_layout, 2, config, policies, "block")
    for found in ranks:
        _, differences = found["block"]
        assert differences and "loss" not in differences  # the forward is as it was


@pytest.mark.one_core
def test_the_kernels_under_a_split_backward(workers: WorkerPool) -> None:
    """States are dropped a second time between I and W, branch inputs stay for W."""
    config = dataclasses.replace(run_config("pp2_zb_h1"), global_batch_size=2)
    kernels = MHCConfig(
        backend="triton", num_streams=2, sinkhorn_iterations=2, contraction="learned"
    )
    policies = {p: dataclasses.replace(kernels, **POLICIES[p]) for p in ("none", "block", "stage")}
    ranks = workers.run(policies_in_a_layout, 2, config, policies)
    check(ranks, policies)
