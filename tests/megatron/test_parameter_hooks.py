"""Parameters are read through module calls, in whose hooks Megatron waits for gathered parameters.

With ``overlap_param_gather`` the distributed optimizer's all-gather of a parameter may still run
when the forward pass starts; DDP finishes it in a forward hook of the module that owns it.
"""

import pytest
import torch
from helpers import layouts
from helpers.pool import WorkerPool
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from mhc_megatron.config import MHCConfig
from mhc_megatron.launch.environment import World
from mhc_megatron.training.config import ModelConfig, ParallelConfig, TrainConfig
from mhc_megatron.training.model import build_chunks, transformer_config
from mhc_megatron.training.optimizer import build_optimizer, update_groups
from mhc_megatron.training.pipeline import forward_backward_func
from mhc_megatron.training.runtime import distributed_runtime
from mhc_megatron.training.step import run_step

LEARNED = MHCConfig(contraction="learned")
# The kernels read the weights of the branches' norms as well.
KERNELS = MHCConfig(contraction="learned", backend="triton", num_streams=2, sinkhorn_iterations=1)


def run_config(mhc: MHCConfig, **options: object) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            num_layers=2, hidden_size=16, num_attention_heads=2, ffn_hidden_size=32, seq_length=8
        ),
        mhc=mhc,
        micro_batch_size=1,
        global_batch_size=2,
        **options,  # type: ignore[arg-type]
    )


def owners_not_called(rank: int, world_size: int, config: TrainConfig) -> list[str]:
    """Modules with parameters of their own whose forward hooks do not run in a forward pass."""
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        [model] = build_chunks(config, transformer_config(config), vocab_size=layouts.VOCAB)
        called: set[torch.nn.Module] = set()
        for module in model.modules():
            module.register_forward_pre_hook(lambda module, _: called.add(module))
        sample = layouts.sample(0, config.model.seq_length)
        model(sample["tokens"], sample["position_ids"], None, labels=sample["labels"])
        return [
            name
            for name, module in model.named_modules()
            if list(module.parameters(recurse=False)) and module not in called
        ]


@pytest.mark.parametrize("mhc", [LEARNED, KERNELS], ids=["reference", "kernels"])
def test_every_owner_of_parameters_is_called(mhc: MHCConfig, workers: WorkerPool) -> None:
    assert workers.run(owners_not_called, 1, run_config(mhc)) == [[]]


def losses(rank: int, world_size: int, config: TrainConfig, overlap: bool) -> list[float]:
    """Three steps with the distributed optimizer, with or without overlapped gathering."""
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        megatron_config = transformer_config(config)
        chunks = build_chunks(config, megatron_config, vocab_size=layouts.VOCAB)
        layouts.randomise(chunks, seed=5)
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
            bucket_size=500,  # many buckets, so that parameters of a layer are apart
        )
        wrapped = [DistributedDataParallel(megatron_config, ddp_config, chunks[0])]
        megatron_config.no_sync_func = wrapped[0].no_sync
        optimizer = build_optimizer(config, wrapped)
        megatron_config.grad_scale_func = optimizer.scale_loss
        forward_backward = forward_backward_func(config, megatron_config)
        found = []
        for step in range(3):
            update_groups(config, optimizer, step)
            wrapped[0].zero_grad_buffer()
            optimizer.zero_grad()
            batches = layouts.micro_batches(config, step)
            found.append(run_step(config, forward_backward, wrapped, batches))
            optimizer.step()
        return found


@pytest.mark.parametrize(
    "mhc",
    [
        pytest.param(LEARNED, id="reference"),
        pytest.param(KERNELS, id="kernels", marks=pytest.mark.one_core),
    ],
)
@pytest.mark.parametrize("ranks", [2])
def test_overlapped_gathering_changes_no_loss(
    ranks: int, mhc: MHCConfig, workers: WorkerPool
) -> None:
    config = run_config(mhc, parallel=ParallelConfig(data=ranks, distributed_optimizer=True))
    plain = workers.run(losses, ranks, config, False)
    assert workers.run(losses, ranks, config, True) == plain
    assert len(set(plain[0])) == 3
