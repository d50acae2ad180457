"""Which process of a run this one is: the only reader of what torchrun and SLURM export."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mhc_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the run's processes.

    Attributes:
        rank: 0 .. world_size - 1, over all nodes.
        local_rank: the number of this process on its node: the index of its GPU.
        world_size: processes in all.
    """

    rank: int
    local_rank: int
    world_size: int


def world_from_environment(environment: Mapping[str, str] | None = None) -> World | None:
    """The place of this process among those that torchrun, srun or ``launch_local`` started.

    torchrun's variables come first: under ``srun torchrun`` both sets exist, and SLURM counts
    torchruns, not ranks. SLURM's count only inside a job step (``SLURM_STEP_ID``), since a batch
    script itself sees them too, although it is one process.

    Args:
        environment: the variables; None means this process's own.

    Returns:
        None if this process was started by hand, on its own.

    Raises:
        UserError: a variable is missing, no number, or outside its range; or several processes
            have no ``MASTER_ADDR`` and ``MASTER_PORT`` at which to meet.
    """
    variables = os.environ if environment is None else environment
    if "RANK" in variables or "WORLD_SIZE" in variables:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    elif "SLURM_PROCID" in variables and "SLURM_STEP_ID" in variables:
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
    else:
        return None
    rank, local_rank, world_size = (_number(variables, name, names) for name in names)
    for name, value in ((names[0], rank), (names[1], local_rank)):
        if value >= world_size:
            raise UserError(
                f"{name}={value} must be below {names[2]}={world_size}; unset them to start a run "
                "by hand"
            )
    if world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not variables.get(name):
                raise UserError(
                    f"{names[2]}={world_size} processes need {name} to find each other; start them "
                    "with torchrun, or export MASTER_ADDR and MASTER_PORT"
                )
    return World(rank=rank, local_rank=local_rank, world_size=world_size)


def _number(variables: Mapping[str, str], name: str, names: tuple[str, ...]) -> int:
    text = variables.get(name)
    if text is None:
        raise UserError(f"{name} is not set; a launcher sets all of {', '.join(names)}, or none")
    if not text.isdecimal():
        raise UserError(f"{name}={text!r} is not a number of 0 or more")
    return int(text)
