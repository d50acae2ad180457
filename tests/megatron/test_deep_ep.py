"""The flex dispatcher without DeepEP: refused before a process group is made."""

import pytest
import torch
from helpers.oracle import FLEX, FLEX_LAYOUT, run_config

from mhc_megatron.errors import UserError
from mhc_megatron.launch.environment import World
from mhc_megatron.megatron import deep_ep
from mhc_megatron.training.runtime import distributed_runtime

ONE_OF_TWO = World(rank=0, local_rank=0, world_size=2)


@pytest.mark.parametrize(
    ("importable", "gpu", "missing"),
    [(False, True, "the package deep_ep"), (True, False, "a GPU that torch can use")],
)
def test_what_it_needs_is_named(
    importable: bool, gpu: bool, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deep_ep, "HAVE_DEEP_EP", importable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    config = run_config(FLEX, FLEX_LAYOUT, dtype="bf16")
    refused = pytest.raises(UserError, match=f"'flex' needs {missing}.*='alltoall'$")
    with refused, distributed_runtime(config, ONE_OF_TWO):
        raise AssertionError("it has started")
