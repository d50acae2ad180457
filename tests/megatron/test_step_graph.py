"""What a graph of a step needs; that it has the bits of its kernels is tested in tests/gpu."""

from typing import Any

import pytest
import torch

from mhc_megatron.errors import UserError
from mhc_megatron.launch.environment import World
from mhc_megatron.megatron import step_graph
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.runtime import distributed_runtime


def test_an_error_in_a_capture_says_what_came_first() -> None:
    with pytest.raises(RuntimeError) as caught:
        try:
            raise ValueError("a sum was asked for\nand more")
        finally:
            raise RuntimeError("a previous error during capture")
    assert step_graph._origin(caught.value) == "a sum was asked for"


def test_no_graph_outlives_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would wait for it; ``benchmarks/multigpu.py`` compares graphs over NCCL."""
    monkeypatch.setattr(step_graph, "capture_stream", lambda: None)
    steps: list[step_graph.StepGraph] = []
    found, ended = [], torch.distributed.destroy_process_group

    def end_groups(*group: Any) -> None:
        found.extend(step._graph for step in steps)
        ended(*group)

    monkeypatch.setattr(torch.distributed, "destroy_process_group", end_groups)
    config = TrainConfig(micro_batch_size=1, global_batch_size=1)
    with distributed_runtime(config, World(rank=0, local_rank=0, world_size=1)):
        steps.append(step_graph.StepGraph(lambda **_: []))
        steps[0]._graph = object()  # type: ignore[assignment]
    assert found and set(found) == {None}


def test_without_a_gpu_it_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    step_graph.capture_stream.cache_clear()
    one = World(rank=0, local_rank=0, world_size=1)
    config = TrainConfig(cuda_graph=True)
    refused = pytest.raises(UserError, match=r"cuda_graph=True needs a GPU .* cuda_graph=False")
    with refused, distributed_runtime(config, one):
        raise AssertionError("it has started")
