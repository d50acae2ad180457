"""The flex dispatcher on every core: Transformer Engine's specs, and stand-ins for it and DeepEP.

Of DeepEP this shows what Megatron asks of it, and nothing that it does (``helpers/fake_deep_ep``).
"""

from collections.abc import Iterator

import pytest
import torch
from helpers import layouts
from helpers.oracle import FLEX, FLEX_LAYOUT, MOE, run_config
from helpers.pool import WorkerPool
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher
from torch import Tensor

from mhc_megatron.config import MHCConfig
from mhc_megatron.launch.environment import World
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.model import build_chunks, transformer_config, wrap_data_parallel
from mhc_megatron.training.pipeline import forward_backward_func
from mhc_megatron.training.runtime import distributed_runtime
from mhc_megatron.training.step import run_step

BLOCKS = MHCConfig(recompute="block", recompute_block=2, sinkhorn_iterations=3)


def step(rank: int, world_size: int, config: TrainConfig) -> tuple[float, bool, dict[str, Tensor]]:
    """A job: a step's loss, whether its dispatchers are flex, and this rank's gradients."""
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        megatron_config = transformer_config(config)
        chunks = build_chunks(config, megatron_config, vocab_size=layouts.VOCAB)
        layouts.randomise(chunks, seed=7)
        wrapped = wrap_data_parallel(config, megatron_config, chunks)
        megatron_config.finalize_model_grads_func = layouts.finalize_whole_gradients
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        forward_backward = forward_backward_func(config, megatron_config)
        loss = run_step(config, forward_backward, wrapped, layouts.micro_batches(config, step=0))
        layers = [layer for chunk in chunks for layer in chunk.modules()]
        dispatchers = [x.token_dispatcher for x in layers if hasattr(x, "token_dispatcher")]
        flex = all(isinstance(dispatcher, MoEFlexTokenDispatcher) for dispatcher in dispatchers)
        gradients = {
            f"{place}.{name}": parameter.main_grad.clone()
            for place, chunk in enumerate(chunks)
            for name, parameter in chunk.named_parameters()
        }
        assert len(dispatchers) == config.model.num_layers
        return loss, flex, gradients


@pytest.fixture(scope="module")
def workers() -> Iterator[WorkerPool]:
    pool = WorkerPool(2, first="helpers.with_deep_ep_and_engine")
    yield pool
    pool.close()


def test_the_bits_of_none_and_the_model_of_alltoall(workers: WorkerPool) -> None:
    def run(model: dict[str, object], overlap: str) -> list[tuple[float, bool, dict[str, Tensor]]]:
        layout = {**FLEX_LAYOUT, "schedule": "dualpipe_v", "overlap": overlap}
        config = run_config(
            model,
            layout,
            mhc=BLOCKS,
            num_layers=4,  # two a stage
            global_batch_size=16,
            dtype="bf16",
            transformer_impl="transformer_engine",
        )
        return workers.run(step, 2, config)

    serial, alltoall = run(FLEX, "none"), run(MOE, "none")
    for (loss, flex, gradients), (other_loss, other_flex, other) in zip(
        serial, alltoall, strict=True
    ):
        assert flex and not other_flex
        assert loss == pytest.approx(other_loss, rel=1e-3)
        for name, gradient in gradients.items():
            assert gradient.abs().sum() > 0, name
            error = (gradient - other[name]).norm() / other[name].norm()
            assert error < 0.1, (name, error)  # bf16, in which either sums up in another order
    for overlap in ("post", "recompute", "all"):
        for (loss, _, gradients), (other_loss, _, other) in zip(
            run(FLEX, overlap), serial, strict=True
        ):
            assert loss == other_loss
            assert gradients.keys() == other.keys()
            assert all(torch.equal(gradients[name], other[name]) for name in other), overlap
