"""Jobs for the worker pool whose checkpoints are written in the background."""

import contextlib
import dataclasses
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.models.gpt import GPTModel

from helpers import training
from mhc_megatron.errors import UserError
from mhc_megatron.launch.environment import World
from mhc_megatron.training.async_save import BackgroundSave
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.loop import train
from mhc_megatron.training.runtime import distributed_runtime
from mhc_megatron.training.stop import StopRequest
from mhc_megatron.training.trainer import Trainer


@contextlib.contextmanager
def writers_wait(wait: Callable[[Path], None]) -> Iterator[None]:
    """Every writer that is forked inside calls ``wait`` with its file before it writes."""
    write = FileSystemWriterAsync.write_preloaded_data

    def waiting(*arguments: Any, **options: Any) -> Any:
        wait(Path(options["write_bucket"][0]))
        return write(*arguments, **options)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(waiting)
    try:
        yield
    finally:
        FileSystemWriterAsync.write_preloaded_data = staticmethod(write)


def until_there(gate: Path) -> Callable[[Path], None]:
    """A wait that ends when the file ``gate`` is made."""

    def wait(_: Path) -> None:
        while not gate.exists():
            time.sleep(0.01)

    return wait


def train_on_meanwhile(
    rank: int, world_size: int, config: TrainConfig, gate: Path
) -> tuple[list[float], list[str], list[str]]:
    """Save after step 2, and let nothing be written before step 4 is over.

    Returns:
        (losses of the steps, checkpoints while the writers wait, checkpoints in the end).
    """
    folder = Path(config.out) / "checkpoints"

    def published() -> list[str]:
        return sorted(path.name for path in folder.glob("step_*"))

    world = World(rank=rank, local_rank=rank, world_size=world_size)
    with distributed_runtime(config, world), writers_wait(until_there(gate)):
        trainer = Trainer(config)
        losses = [trainer.step(step).loss for step in range(trainer.resume(), 2)]
        trainer.save(2)
        for step in (2, 3):
            losses.append(trainer.step(step).loss)
            trainer.poll_save()
        waiting = published()
        gate.touch()
        trainer.finish_save()
        return losses, waiting, published()


def slowly_written(
    rank: int, world_size: int, config: TrainConfig, spoilt: dict[int, float]
) -> tuple[dict[int, float], str]:
    """``training.spoil_steps`` on a slow disk."""
    with writers_wait(lambda _: time.sleep(0.3)):
        return training.spoil_steps(rank, world_size, config, spoilt)


class _StopAfterStep(StopRequest):
    """A signal has come by the end of step 1."""

    def agreed(self) -> bool:
        return True


def stopped(rank: int, world_size: int, config: TrainConfig) -> list[str]:
    """Train until told to stop, on a slow disk; what there is in the folder of checkpoints."""
    with writers_wait(lambda _: time.sleep(0.3)):
        world = World(rank=rank, local_rank=rank, world_size=world_size)
        train(config, world, _StopAfterStep(()))
    return sorted(path.name for path in (Path(config.out) / "checkpoints").iterdir())


def die_meanwhile(rank: int, world_size: int, config: TrainConfig) -> None:
    """Rank 1 dies by SIGKILL in step 3; the writers of step 2 never come to their end."""
    forwards = 0

    def die(module: torch.nn.Module, arguments: object) -> None:
        nonlocal forwards
        forwards += isinstance(module, GPTModel) and module.training
        if forwards == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    def wait(file: Path) -> None:
        if "step_00000002" in str(file):
            file.write_bytes(b"a part")
            time.sleep(3600)

    if rank == 1:
        torch.nn.modules.module.register_module_forward_pre_hook(die)
    with writers_wait(wait):
        train(config, World(rank=rank, local_rank=rank, world_size=world_size), StopRequest(()))


def full_disk(rank: int, world_size: int, config: TrainConfig) -> str:
    """Train a whole run; rank 1 has no room for its part of the checkpoint of step 2.

    Returns the message of the UserError that ended the run.
    """
    start = BackgroundSave.start

    def limited(self: BackgroundSave, step: int, **options: Any) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if step == 2 and rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            start(self, step, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    BackgroundSave.start = limited  # type: ignore[method-assign]
    try:
        train(config, World(rank=rank, local_rank=rank, world_size=world_size), StopRequest(()))
    except UserError as error:
        return str(error)
    finally:
        BackgroundSave.start = start  # type: ignore[method-assign]
    return ""


def never_written(
    rank: int, world_size: int, config: TrainConfig, gate: Path, killed: bool
) -> tuple[str, list[str]]:
    """Save after step 1, and after step 2 with a writer that is killed, or never writes.

    Returns:
        (the message of the UserError, the checkpoints that are left).
    """
    world = World(rank=rank, local_rank=rank, world_size=world_size)
    message = ""
    with distributed_runtime(config, world):
        trainer = Trainer(config)
        trainer.step(0)
        trainer.save(1)
        trainer.finish_save()
        trainer.step(1)
        if not killed:  # from here on: the first checkpoint had all the time that it needed
            short = dataclasses.replace(config, timeout_minutes=0.05)
            trainer.background = BackgroundSave(Path(config.out) / "checkpoints", short)
        try:
            with writers_wait(until_there(gate)), trainer.background as background:
                trainer.save(2)
                if killed:
                    background._queue.async_calls[0].async_caller.process.kill()
                trainer.finish_save()
        except UserError as error:
            message = str(error)
    gate.touch()
    return message, sorted(path.name for path in (Path(config.out) / "checkpoints").iterdir())
