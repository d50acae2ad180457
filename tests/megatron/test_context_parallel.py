"""Hyper-connections are token-local: under CP their gradients join the DP x CP reduction.

megatron-core's local attention cannot run under CP, so attention is replaced by a token-local
stand-in; then every layer is token-local, and CP=2 must equal one process.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from helpers import layouts
from helpers.pool import WorkerPool
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from mhc_megatron.launch.environment import World
from mhc_megatron.megatron.spec import gpt_block_spec
from mhc_megatron.training.config import ModelConfig, ParallelConfig, TrainConfig
from mhc_megatron.training.model import transformer_config, wrap_data_parallel
from mhc_megatron.training.pipeline import forward_backward_func
from mhc_megatron.training.runtime import distributed_runtime
from mhc_megatron.training.step import run_step


class TokenLocalAttention(torch.nn.Module):
    """Depends on query, key and value of the same token only."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return (torch.sigmoid(query * key) * value).flatten(-2)


def run_config(context: int) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, seq_length=16
        ),
        parallel=ParallelConfig(context=context),
        micro_batch_size=1,
        global_batch_size=2,
        transformer_impl="transformer_engine",
    )


def token_local_model(config: TrainConfig) -> tuple[GPTModel, Any]:
    megatron_config = transformer_config(config)
    block = gpt_block_spec(megatron_config, config.mhc, use_transformer_engine=False)
    specs = []
    for spec in block.layer_specs:
        attention = spec.submodules.self_attention
        inner = dataclasses.replace(attention.submodules, core_attention=TokenLocalAttention)
        attention = dataclasses.replace(attention, submodules=inner)
        layer = dataclasses.replace(spec.submodules, self_attention=attention)
        specs.append(dataclasses.replace(spec, submodules=layer))
    model = GPTModel(
        config=megatron_config,
        transformer_layer_spec=dataclasses.replace(block, layer_specs=specs),
        vocab_size=128,
        max_sequence_length=config.model.seq_length,
        position_embedding_type="rope",
    )
    return model, megatron_config


def step(
    rank: int, world_size: int, config: TrainConfig, initial: str, gradients: str, save: bool
) -> float:
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        model, megatron_config = token_local_model(config)
        if save:
            layouts.randomise([model], seed=3)
            dist_checkpointing.save(layouts.sharded([model]), initial)
        dist_checkpointing.load(layouts.sharded([model]), initial)
        wrapped = wrap_data_parallel(config, megatron_config, [model])
        wrapped[0].zero_grad_buffer()
        loss = run_step(
            config,
            forward_backward_func(config, megatron_config),
            wrapped,
            layouts.micro_batches(config, step=0),
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = parameter.main_grad.clone()
        dist_checkpointing.save(layouts.sharded([model]), gradients)
        return loss


def test_cp2_equals_single_process(workers: WorkerPool, tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("initial", "single", "cp2")}
    for folder in folders.values():
        folder.mkdir()
    initial = str(folders["initial"])
    [expected] = workers.run(step, 1, run_config(1), initial, str(folders["single"]), True)
    losses = workers.run(step, 2, run_config(2), initial, str(folders["cp2"]), False)
    # Half of the tokens per rank: sums in another order, float32.
    assert max(abs(loss / expected - 1) for loss in losses) < 1e-6
    [errors] = workers.run(layouts.differences, 1, str(folders["cp2"]), str(folders["single"]))
    assert sum("hyper_connection" in name for name in errors) == 10
    assert max(errors.values()) < 1e-4, errors
