"""Which releases of megatron-core have the training loop, and the environment that it gets."""

import os
import typing
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from mhc_megatron.errors import UserError
from mhc_megatron.launch.environment import World, training_loop_environment
from mhc_megatron.megatron.compat import core_version, require_training_loop, typing_override
from mhc_megatron.megatron.cpu_runtime import training_loop_cpu_runtime


def test_a_release_without_the_loop_is_refused() -> None:
    version = core_version()
    if version >= Version("0.19"):
        require_training_loop()
        return
    with pytest.raises(UserError) as refused:
        require_training_loop()
    assert str(refused.value) == (
        f"Megatron's own training loop needs megatron-core 0.19, this is {version}: its wheel has "
        "no megatron.training; install megatron-core>=0.19 (Python 3.12 or newer), or use "
        "mhc-megatron train"
    )


def test_megatron_finds_the_variables_it_reads_and_nothing_to_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MAKEFLAGS", raising=False)
    monkeypatch.setenv("RANK", "7")
    world = World(rank=1, local_rank=0, world_size=2)
    with training_loop_environment(world, datasets=tmp_path):
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        assert [os.environ[name] for name in names] == ["1", "0", "2"]
        assert os.system(f"make -s -C {tmp_path}") == 0
    assert os.environ["RANK"] == "7" and "MAKEFLAGS" not in os.environ

    (tmp_path / "Makefile").write_text("all: ; exit 1\n")
    with training_loop_environment(None, datasets=tmp_path):
        assert "MAKEFLAGS" not in os.environ and os.environ["WORLD_SIZE"] == "1"


def test_what_stands_in_for_python_and_cuda_is_put_back() -> None:
    had_override = hasattr(typing, "override")
    before = torch.cuda.is_available, torch.cuda.get_device_properties
    with typing_override(), training_loop_cpu_runtime():
        assert hasattr(typing, "override")
        assert torch.cuda.is_available()
    assert (torch.cuda.is_available, torch.cuda.get_device_properties) == before
    assert hasattr(typing, "override") == had_override
