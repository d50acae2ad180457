"""A distributed runtime of one process, for Megatron's modules that ask for their groups."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

import cudnn_first  # noqa: F401

from mhc_megatron.launch.environment import World
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.runtime import distributed_runtime


@contextlib.contextmanager
def one_process(backend: str | None = None, *, cuda_graph: bool = False) -> Iterator[None]:
    """Initialised while the context is open; ``backend`` as for ``distributed_runtime``.

    With ``cuda_graph`` random numbers can be drawn while a graph is captured.

    Megatron's and torch's notes on deprecations stay out of the output from then on.
    """
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    single = TrainConfig(micro_batch_size=1, global_batch_size=1, cuda_graph=cuda_graph)
    world = World(rank=0, local_rank=0, world_size=1)
    with distributed_runtime(single, world, backend=backend):
        yield
