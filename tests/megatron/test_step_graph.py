"""What a graph of a step needs; that it has the bits of its kernels is tested in tests/gpu."""

from typing import Any

import pytest
import torch

from mhc_megatron.errors import UserError
from mhc_megatron.launch.environment import World
from mhc_megatron.megatron import compat, step_graph
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


@pytest.mark.parametrize(
    "given, asked",
    [
        (None, ["graph_capture_record_stream_reuse:True"]),
        (
            "expandable_segments:True",
            ["expandable_segments:True,graph_capture_record_stream_reuse:True"],
        ),
        ("graph_capture_record_stream_reuse:False", []),
    ],
)
def test_a_graph_asks_to_use_memory_of_lanes_again_beside_what_the_environment_sets(
    given: str | None, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: list[str] = []
    monkeypatch.setattr(
        torch._C, "_accelerator_setAllocatorSettings", settings.append, raising=False
    )
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", given)
    compat.reuse_memory_of_lanes()
    assert settings == asked


def test_a_torch_that_cannot_keeps_what_the_environment_sets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings: list[str] = []

    def set_allocator(text: str) -> None:
        if compat.REUSE in text:
            raise RuntimeError("Unrecognized key")
        settings.append(text)

    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", set_allocator, raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    compat.reuse_memory_of_lanes()
    assert settings == ["expandable_segments:True"]
