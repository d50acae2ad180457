"""Where a process finds its rank."""

import os

import pytest

from mhc_megatron.errors import UserError
from mhc_megatron.launch.environment import (
    World,
    expect_messages_in_order,
    world_from_environment,
)

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_ID": "0",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, None),
        (TORCHRUN, World(rank=3, local_rank=1, world_size=4)),
        (SLURM, World(rank=2, local_rank=0, world_size=4)),
        ({**SLURM, **TORCHRUN}, World(rank=3, local_rank=1, world_size=4)),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
            World(rank=0, local_rank=0, world_size=1),
        ),
        ({key: SLURM[key] for key in ("SLURM_PROCID", "SLURM_NTASKS")}, None),
    ],
    ids=["by hand", "torchrun", "srun", "srun torchrun", "alone", "batch script"],
)
def test_world(environment: dict[str, str], world: World | None) -> None:
    assert world_from_environment(environment) == world


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "LOCAL_RANK is not set; a launcher sets all of RANK, LOCAL_RANK"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({**TORCHRUN, "RANK": "one"}, "RANK='one' is not a number"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK='-1' is not a number"),
        ({**TORCHRUN, "RANK": "4"}, "RANK=4 must be below WORLD_SIZE=4"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "WORLD_SIZE=4 processes need MASTER_PORT"),
        ({**SLURM, "MASTER_ADDR": ""}, "SLURM_NTASKS=4 processes need MASTER_ADDR"),
    ],
)
def test_a_broken_environment_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        world_from_environment(environment)


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert world_from_environment() == World(rank=3, local_rank=1, world_size=4)


def test_a_warning_that_was_asked_for_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING"
    monkeypatch.setenv(name, "1")
    expect_messages_in_order()
    assert os.environ[name] == "1"
    monkeypatch.setenv(name, "")  # so that it is put back
    monkeypatch.delenv(name)
    expect_messages_in_order()
    assert os.environ[name] == "0"
