"""Calls of Megatron's modules as CUDA graphs."""

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from megatron.core.tensor_parallel.random import get_all_rng_states

Result = TypeVar("Result")


def side_stream(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A stream on which calls can be captured, which the default one is not; nothing on a CPU."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))


def capture(call: Callable[[], Result], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Result]:
    """The graph of a call, on the current stream, and what the call returned.

    Args:
        call: warm, and under ``one_process(cuda_graph=True)``; replays overwrite its result.
        pool: of a graph with which it shares memory, and whose replay always comes before.
    """
    graph = torch.cuda.CUDAGraph()
    for state in get_all_rng_states().values():
        graph.register_generator_state(state)
    stream = torch.cuda.current_stream()
    # Other threads may ask for their events meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = call()
    return graph, result
