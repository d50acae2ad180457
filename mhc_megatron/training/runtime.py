"""The distributed side of a run: devices, process groups, seeds; entered once, always left."""

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Literal

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.tensor_parallel.random import initialize_rng_tracker

from mhc_megatron.errors import UserError
from mhc_megatron.launch.environment import World
from mhc_megatron.megatron.compat import forget_moe_metrics, require_supported_core
from mhc_megatron.megatron.cpu_runtime import cpu_runtime
from mhc_megatron.megatron.deep_ep import require_deep_ep
from mhc_megatron.megatron.step_graph import capture_stream, forget_graphs
from mhc_megatron.training.config import TrainConfig

# Different pipeline stages draw different weights (Megatron-LM's own stride).
_PIPELINE_SEED_STRIDE = 100


@contextlib.contextmanager
def distributed_runtime(
    config: TrainConfig, world: World, *, backend: Literal["nccl", "gloo"] | None = None
) -> Iterator[None]:
    """Everything megatron-core needs before a model can be built; undone on exit.

    After an exception NCCL's groups stay as they are, and the process must end.

    The process group reads ``MASTER_ADDR`` and ``MASTER_PORT`` from the environment, as torchrun
    sets them.

    Args:
        config: its layout and seed.
        world: this process and how many there are.
        backend: of all process groups; None for NCCL on GPUs, and gloo inside ``cpu_runtime``
            elsewhere. As Megatron's own script does, a group gets no device: its communicator is
            made, and takes GPU memory, when the group is first used, and most never are.

    Raises:
        UserError: the number of processes is not the layout's, or what the configuration needs is
            not here: a GPU for ``cuda_graph``, DeepEP for ``model.moe_token_dispatcher="flex"``.
    """
    layout = config.parallel
    if world.world_size != layout.world_size:
        raise UserError(
            f"{world.world_size} processes run, but the layout needs tensor {layout.tensor} x "
            f"pipeline {layout.pipeline} x context {layout.context} x data {layout.data} = "
            f"{layout.world_size}; start {layout.world_size} or change parallel.*"
        )
    require_supported_core()
    on_gpu = torch.cuda.is_available()
    backend = backend or ("nccl" if on_gpu else "gloo")
    if on_gpu:
        torch.cuda.set_device(world.local_rank)
    if config.cuda_graph:
        capture_stream()  # refuses a machine without a GPU
    if config.model.moe_token_dispatcher == "flex":
        require_deep_ep()
    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu_runtime())
        torch.distributed.init_process_group(
            backend,
            rank=world.rank,
            world_size=world.world_size,
            timeout=timedelta(minutes=config.timeout_minutes),
            # A lone rank of srun has no address at which to meet itself.
            store=torch.distributed.HashStore() if world.world_size == 1 else None,
        )
        stack.callback(torch.distributed.destroy_process_group)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            # Two copies of a stage are data-parallel replicas to Megatron (training/pipeline.py).
            pipeline_model_parallel_size=layout.pipeline // layout.num_copies,
            virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
            context_parallel_size=layout.context,
            expert_model_parallel_size=layout.expert,
        )
        stack.callback(parallel_state.destroy_model_parallel)
        stack.callback(forget_moe_metrics)
        init_num_microbatches_calculator(
            rank=world.rank,
            rampup_batch_size=None,
            global_batch_size=config.global_batch_size,
            micro_batch_size=config.micro_batch_size,
            data_parallel_size=layout.data,
        )
        stack.callback(destroy_num_microbatches_calculator)
        # A graph counts on the states of random numbers, and keeps them on the GPU.
        initialize_rng_tracker(use_cudagraphable_rng=config.cuda_graph, force_reset=True)
        set_seed(config.seed)
        stack.callback(forget_graphs)
        try:
            yield
        except BaseException:
            if backend == "nccl":
                # What failed here left messages half sent, and NCCL waits for their other ends
                # before it lets a group go. The process is about to end (worker.leave).
                stack.pop_all()
            raise


def set_seed(seed: int, *, stage: int | None = None) -> None:
    """Seed this rank: equal over TP and DP for whole weights, different per pipeline stage.

    Args:
        seed: of the run.
        stage: of the model; None for the pipeline rank's number.
    """
    if stage is None:
        stage = parallel_state.get_pipeline_model_parallel_rank()
    seed += _PIPELINE_SEED_STRIDE * stage
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
