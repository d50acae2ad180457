"""What the environment says of this process and its run, and what Megatron wants to find there."""

import contextlib
import os
import platform
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

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


def stop_signals(environment: Mapping[str, str] | None = None) -> tuple[signal.Signals, ...]:
    """The signals by which a cluster tells this process that its time is up.

    SLURM's, where srun started the ranks themselves: SIGUSR1, which the batch script asks for, and
    SIGTERM, which a preemption sends. None elsewhere: the local launcher, torchrun and people send
    SIGTERM to end a run at once.

    Args:
        environment: the variables; None means this process's own.
    """
    variables = os.environ if environment is None else environment
    if "RANK" in variables or "SLURM_STEP_ID" not in variables:
        return ()
    return (signal.SIGUSR1, signal.SIGTERM)


def node_name() -> str:
    """The name of this node, as SLURM calls it where it started this process."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def cuda_connections() -> str | None:
    """``CUDA_DEVICE_MAX_CONNECTIONS``, hardware queues of a GPU; None where CUDA decides."""
    return os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")


def look_for_cudnn_in(folder: Path) -> None:
    """Where Transformer Engine looks first for the cuDNN that it opens."""
    os.environ["CUDNN_HOME"] = str(folder)


def expect_messages_in_order() -> None:
    """Let torch not warn, for each edge of a pipeline, that NCCL sends one message at a time there.

    For process groups that are made afterwards; a value that is set stays.
    """
    os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "0")


def allows_pickled_scales() -> bool:
    """Whether Transformer Engine may load pickles from checkpoints."""
    return os.environ.get("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE") == "1"


def _number(variables: Mapping[str, str], name: str, names: tuple[str, ...]) -> int:
    text = variables.get(name)
    if text is None:
        raise UserError(f"{name} is not set; a launcher sets all of {', '.join(names)}, or none")
    if not text.isdecimal():
        raise UserError(f"{name}={text!r} is not a number of 0 or more")
    return int(text)


def mhc_variables() -> dict[str, str]:
    """The variables that begin with ``MHC_``: options of the hyper-connections."""
    return {name: text for name, text in os.environ.items() if name.startswith("MHC_")}


@contextlib.contextmanager
def training_loop_environment(world: World | None, *, datasets: Path) -> Iterator[None]:
    """Variables for ``megatron.training`` while the context is open; afterwards as they were.

    Megatron reads torchrun's names only. It also runs ``make`` in its folder of datasets and exits
    where that fails, which it does in the published wheels: their helper is compiled and they have
    no Makefile. ``make`` takes a goal with nothing to do from ``MAKEFLAGS``.

    Args:
        world: this process among the run's; None if it is the only one.
        datasets: the folder ``megatron/core/datasets``.
    """
    place = world or World(rank=0, local_rank=0, world_size=1)
    variables = {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.world_size),
    }
    if not (datasets / "Makefile").exists():
        variables["MAKEFLAGS"] = "--eval=all:;"
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, text in before.items():
            if text is None:
                del os.environ[name]
            else:
                os.environ[name] = text
