"""Gradient accumulation fusion under Megatron's DDP: what its hooks collect, to the last bit."""

import pytest
from helpers import layouts
from helpers.pool import WorkerPool
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from mhc_megatron.config import MHCConfig
from mhc_megatron.hyper_connection import MappingProjection
from mhc_megatron.launch.environment import World
from mhc_megatron.megatron.layer import MHCTransformerLayer
from mhc_megatron.training.config import ModelConfig, ParallelConfig, TrainConfig
from mhc_megatron.training.model import build_chunks, transformer_config
from mhc_megatron.training.pipeline import forward_backward_func
from mhc_megatron.training.runtime import distributed_runtime
from mhc_megatron.training.step import run_step


def run_config(backend: str, ranks: int = 2) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            num_layers=2, hidden_size=16, num_attention_heads=2, ffn_hidden_size=32, seq_length=8
        ),
        mhc=MHCConfig(backend=backend, num_streams=2, sinkhorn_iterations=2),  # type: ignore[arg-type]
        parallel=ParallelConfig(data=ranks),
        micro_batch_size=1,
        global_batch_size=2 * ranks,
    )


def main_grads(
    rank: int, world_size: int, config: TrainConfig, fused: bool, overlap: bool
) -> dict[str, tuple[bool, list[float]]]:
    """``grad_added_to_main_grad`` and ``main_grad`` of every parameter, after two steps.

    Megatron's own linear layers need an extension for the fusion, so that it is switched on in the
    hyper-connections alone.
    """
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        megatron_config = transformer_config(config)
        chunks = build_chunks(config, megatron_config, vocab_size=layouts.VOCAB)
        layouts.randomise(chunks, seed=5)
        for module in chunks[0].modules():
            if isinstance(module, MappingProjection):
                module.gradient_accumulation_fusion = fused
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, bucket_size=500
        )
        model = DistributedDataParallel(megatron_config, ddp_config, chunks[0])
        megatron_config.no_sync_func = model.no_sync
        forward_backward = forward_backward_func(config, megatron_config)
        for step in range(2):
            model.zero_grad_buffer()
            run_step(config, forward_backward, [model], layouts.micro_batches(config, step))
        return {
            name: (parameter.grad_added_to_main_grad, parameter.main_grad.flatten().tolist())
            for name, parameter in model.named_parameters()
        }


@pytest.mark.parametrize("overlap", [False, True], ids=["after", "overlapped"])
@pytest.mark.parametrize(
    "backend", [pytest.param("triton", marks=pytest.mark.one_core), "reference"]
)
def test_the_same_gradients_as_without_fusion(
    backend: str, overlap: bool, workers: WorkerPool
) -> None:
    config = run_config(backend)
    plain = workers.run(main_grads, 2, config, False, overlap)
    fused = workers.run(main_grads, 2, config, True, overlap)
    for expected, got in zip(plain, fused, strict=True):
        assert expected.keys() == got.keys()
        for name, (added, gradient) in got.items():
            assert added == name.endswith("mapping_proj.weight"), name
            assert not expected[name][0]
            assert gradient == expected[name][1], name
            assert not added or any(gradient), name


def fusion_of_a_layer(rank: int, world_size: int, config: TrainConfig, fusion: bool) -> list[bool]:
    """What the hyper-connections of a layer around no branches take from the configuration."""
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        megatron_config = transformer_config(config)
        megatron_config.gradient_accumulation_fusion = fusion
        layer = MHCTransformerLayer(megatron_config, TransformerLayerSubmodules(), mhc=config.mhc)
        return [
            module.gradient_accumulation_fusion
            for module in layer.modules()
            if isinstance(module, MappingProjection)
        ]


@pytest.mark.parametrize("fusion", [False, True])
def test_a_layer_follows_gradient_accumulation_fusion(fusion: bool, workers: WorkerPool) -> None:
    config = run_config("reference", ranks=1)
    assert workers.run(fusion_of_a_layer, 1, config, fusion) == [[fusion, fusion]]
