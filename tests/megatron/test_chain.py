"""From layer to layer in one pass over the streams: what is handed over; no bit changes."""

from typing import Any

import torch
from helpers import layouts
from helpers.pool import WorkerPool
from megatron.core.models.gpt import GPTModel

from mhc_megatron.config import MHCConfig
from mhc_megatron.hyper_connection import HyperConnection
from mhc_megatron.launch.environment import World
from mhc_megatron.megatron.layer import MHCTransformerLayer
from mhc_megatron.megatron.spec import gpt_block_spec
from mhc_megatron.training.config import ModelConfig, TrainConfig
from mhc_megatron.training.model import transformer_config
from mhc_megatron.training.runtime import distributed_runtime

LAYERS = 3


def run_config(**options: Any) -> TrainConfig:
    model = ModelConfig(
        num_layers=LAYERS, hidden_size=16, num_attention_heads=2, ffn_hidden_size=32, seq_length=8
    )
    return TrainConfig(model=model, micro_batch_size=1, global_batch_size=1, **options)


def count_pre(model: torch.nn.Module) -> list[int]:
    """A list that grows by the sublayer of every ``pre`` that is not part of a ``post_pre``."""
    calls: list[int] = []

    def counted(connection: HyperConnection) -> None:
        pre = connection.pre

        def call(streams: torch.Tensor, **keywords: Any) -> Any:
            calls.append(connection.sublayer)
            return pre(streams, **keywords)

        connection.pre = call  # type: ignore[method-assign]

    for module in model.modules():
        if isinstance(module, HyperConnection):
            counted(module)
    return calls


def two_models(
    rank: int, world_size: int, config: TrainConfig
) -> tuple[list[int], list[int], list[dict[str, torch.Tensor]]]:
    """Two models of one spec, the second without handing over: calls of ``pre``, and gradients."""
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        megatron_config = transformer_config(config)
        spec = gpt_block_spec(megatron_config, config.mhc, use_transformer_engine=False)
        models = [
            GPTModel(
                config=megatron_config,
                transformer_layer_spec=spec,
                vocab_size=128,
                max_sequence_length=8,
                position_embedding_type="rope",
            )
            for _ in range(2)
        ]
        layouts.randomise([models[0]], seed=1)
        models[1].load_state_dict(models[0].state_dict())
        for module in models[1].modules():
            if isinstance(module, MHCTransformerLayer):
                module.hands_over = False
        calls = [count_pre(model) for model in models]
        sample = layouts.sample(0, 8)
        gradients = []
        for model in models:
            losses = model(sample["tokens"], sample["position_ids"], None, labels=sample["labels"])
            if config.recompute == "none":
                losses.sum().backward()
            gradients.append({name: p.grad for name, p in model.named_parameters()})
        return calls[0], calls[1], gradients


def test_only_the_first_layer_reads_the_streams_by_itself(workers: WorkerPool) -> None:
    [(chained, apart, gradients)] = workers.run(two_models, 1, run_config())
    assert chained == [0]
    assert apart == [2 * layer for layer in range(LAYERS)]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_single_pass_layers_hand_over_the_same_bits(workers: WorkerPool) -> None:
    config = run_config(mhc=MHCConfig(variant="single_pass", contraction="read"))
    [(chained, apart, gradients)] = workers.run(two_models, 1, config)
    assert chained == [0]
    assert apart == [2 * layer for layer in range(LAYERS)]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_full_recompute_hands_nothing_over(workers: WorkerPool) -> None:
    [(calls, _, _)] = workers.run(two_models, 1, run_config(recompute="full"))
    assert calls == [2 * layer for layer in range(LAYERS)]
