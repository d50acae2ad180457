"""A rank that failed on a GPU ends without what waits for the others."""

import contextlib
import os
from typing import Any

import pytest
import torch

from mhc_megatron.launch.environment import World
from mhc_megatron.training import runtime, worker
from mhc_megatron.training.config import TrainConfig

SINGLE = TrainConfig(micro_batch_size=1, global_batch_size=1)
WORLD = World(rank=0, local_rank=0, world_size=1)


@pytest.mark.parametrize("status", [0, 1, 2])
@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_failure_ends_the_process_where_there_is_a_gpu(
    status: int, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: on_gpu)
    monkeypatch.setattr(os, "_exit", ended.append)
    worker.leave(status)
    assert ended == ([status] if on_gpu and status else [])


def test_another_error_is_printed_before_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any) -> int:
        raise RuntimeError("pipeline rank 0 failed at recv 1I3")

    monkeypatch.setattr(worker, "_run", failing)
    assert worker.run(SINGLE, WORLD) == 1
    assert "pipeline rank 0 failed at recv 1I3" in capsys.readouterr().err


@pytest.mark.parametrize(("backend", "ended"), [("gloo", ["group"]), ("nccl", [])])
def test_nccls_groups_are_left_alone_after_a_failure(
    backend: Any, ended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    for module, name, replacement in (
        (torch.distributed, "init_process_group", lambda *_, **__: None),
        (torch.distributed, "destroy_process_group", lambda: found.append("group")),
        (runtime.parallel_state, "initialize_model_parallel", lambda **_: None),
        (runtime.parallel_state, "destroy_model_parallel", lambda: None),
        (runtime, "set_seed", lambda seed: None),
        (runtime, "cpu_runtime", contextlib.nullcontext),
    ):
        monkeypatch.setattr(module, name, replacement)
    with pytest.raises(KeyError), runtime.distributed_runtime(SINGLE, WORLD, backend=backend):
        raise KeyError
    assert found == ended
    runtime.destroy_num_microbatches_calculator()
