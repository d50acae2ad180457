"""Recompute policies: the bits of every gradient, what is dropped and rebuilt, and when."""

import dataclasses
from typing import Any

import pytest
import torch
from helpers.pool import WorkerPool
from helpers.small_gpt import build, losses_of

from mhc_megatron import recompute
from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.launch.environment import World
from mhc_megatron.megatron.chain import chain_of
from mhc_megatron.training.config import ModelConfig, TrainConfig
from mhc_megatron.training.runtime import distributed_runtime

LAYERS = 3
POLICIES: dict[str, dict[str, Any]] = {
    "block1": {"recompute": "block", "recompute_block": 1},
    "block2": {"recompute": "block", "recompute_block": 2},
    "block3": {"recompute": "block", "recompute_block": 3},  # ends inside a layer
    "block4": {"recompute": "block", "recompute_block": 4},  # the last block is shorter
    "auto": {"recompute": "auto"},
    "stage": {"recompute": "stage"},
}


def run_small(mhc: MHCConfig, **options: Any) -> TrainConfig:
    model = ModelConfig(
        num_layers=LAYERS, hidden_size=16, num_attention_heads=2, ffn_hidden_size=32, seq_length=8
    )
    return TrainConfig(model=model, mhc=mhc, micro_batch_size=1, global_batch_size=1, **options)


class Memory:
    """Watches every tensor that a forward drops."""

    def __init__(self) -> None:
        self.dropped: list[recompute.Dropped] = []
        watched = self.dropped
        initialise = recompute.Dropped.__init__

        def watching(self: recompute.Dropped, tensor: torch.Tensor) -> None:
            initialise(self, tensor)
            watched.append(self)

        self.undo = lambda: setattr(recompute.Dropped, "__init__", initialise)
        recompute.Dropped.__init__ = watching  # type: ignore[method-assign]

    def sizes(self) -> list[int]:
        return [dropped.alias.untyped_storage().nbytes() for dropped in self.dropped]


def policies_in_one_process(
    rank: int, world_size: int, backend: str, names: list[str]
) -> dict[str, tuple]:
    """Per policy: losses and gradients of two micro-batches in flight, and what was dropped."""
    results = {}
    base = MHCConfig(backend=backend, sinkhorn_iterations=3)  # type: ignore[arg-type]
    for name in names:
        mhc = dataclasses.replace(base, **POLICIES.get(name, {}))
        config = run_small(mhc)
        with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
            model, memory = build(config), Memory()
            try:
                losses = [losses_of(model, index) for index in range(2)]
                before = memory.sizes()
                handle = None if mhc.recompute == "none" else chain_of(model).recompute
                if handle is not None:
                    handle.take().rebuild()  # of the second: by hand, before its backward
                by_hand = memory.sizes()
                for loss in losses:
                    loss.sum().backward()
            finally:
                memory.undo()
            gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
            results[name] = ([x.detach() for x in losses], gradients, before, by_hand)
    return results


@pytest.mark.parametrize(
    "backend", ["reference", pytest.param("triton", marks=pytest.mark.one_core)]
)
def test_the_same_bits_and_what_is_dropped(backend: str, workers: WorkerPool) -> None:
    names = ["none", *POLICIES] if backend == "reference" else ["none", "block3", "stage"]
    [results] = workers.run(policies_in_one_process, 1, backend, names)
    losses, gradients, before, _ = results.pop("none")
    assert not before
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    sublayers = 2 * LAYERS
    blocks = {"block1": 6, "block2": 3, "block3": 2, "block4": 2, "auto": 3, "stage": 1}
    last = {"block1": 1, "block2": 2, "block3": 3, "block4": 2, "auto": 2, "stage": 6}
    for name, (same_losses, same_gradients, dropped, by_hand) in results.items():
        assert all(map(torch.equal, losses, same_losses)), name
        for key, gradient in gradients.items():
            assert torch.equal(gradient, same_gradients[key]), (name, key)
        # Per micro-batch u of each sublayer, before and after its norm unless the kernels apply it,
        # and all states but the first.
        inputs = 1 if backend == "triton" else 2
        assert dropped == [0] * (2 * (inputs * sublayers + sublayers - blocks[name])), name
        rebuilt = sum(size > 0 for size in by_hand)
        assert rebuilt == inputs * last[name] + last[name] - 1, name


def spoiled(rank: int, world_size: int) -> tuple[bool, str, str]:
    """Mutation: one coefficient of a rebuild is wrong. And two uses that cannot work."""
    config = run_small(MHCConfig(backend="reference", recompute="stage"))
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        model = build(config)
        found = []
        for spoil in (False, True):
            model.zero_grad()
            loss = losses_of(model, 0)
            handle = chain_of(model).recompute
            assert handle is not None
            if spoil:
                block = handle.current._block
                assert block is not None
                block._mixes[1].res.mul_(1.5)
            loss.sum().backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        differs = any(not torch.equal(found[0][name], found[1][name]) for name in found[0])
        # The decoder alone: Megatron's cross entropy works in place and has one backward only.
        hidden = torch.randn(8, 1, 16, requires_grad=True)
        out = model.decoder(hidden, None, rotary_pos_emb=model.rotary_pos_emb(8)).sum()
        out.backward(retain_graph=True)
        with pytest.raises(UserError) as twice:
            out.backward()
        model.decoder.layers[0].register_forward_hook(
            lambda module, args, output: (output[0].clone(), output[1])
        )
        with pytest.raises(UserError) as replaced:
            losses_of(model, 0)
        return differs, str(twice.value), str(replaced.value)


@pytest.mark.one_core
def test_mutation_and_misuse(workers: WorkerPool) -> None:
    [(differs, twice, replaced)] = workers.run(spoiled, 1)
    assert differs
    assert twice.startswith("a second backward through hyper-connections whose states are dropped")
    assert replaced.startswith("hidden states were replaced between two layers")
