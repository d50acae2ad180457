"""Jobs for the worker pool: stretches of training and their losses."""

import json
import logging
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel

from mhc_megatron.errors import UserError
from mhc_megatron.launch.environment import World
from mhc_megatron.pipeline.distributed import DistributedReceipt
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.loop import train
from mhc_megatron.training.runtime import distributed_runtime
from mhc_megatron.training.stop import StopRequest
from mhc_megatron.training.trainer import Trainer


def train_steps(
    rank: int, world_size: int, config: TrainConfig, until: int, save: bool = False
) -> list[float]:
    """Resume if there is a checkpoint, train to step ``until``; the losses of these steps."""
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        trainer = Trainer(config)
        losses = [trainer.step(step).loss for step in range(trainer.resume(), until)]
        if save:
            trainer.save(until)
        return losses


@dataclass(frozen=True)
class Resumed:
    """The losses of the steps after a resume, and what was logged meanwhile."""

    losses: list[float]
    warnings: list[str]


def resumed_losses(rank: int, world_size: int, config: TrainConfig, until: int) -> Resumed:
    """``train_steps``, and what a person would read."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("mhc_megatron.training")
    logger.addHandler(handler)
    try:
        losses = train_steps(rank, world_size, config, until)
    finally:
        logger.removeHandler(handler)
    return Resumed(losses, [record.getMessage() for record in records])


def save_on_a_full_disk(
    rank: int, world_size: int, config: TrainConfig, until: int, limit: int
) -> None:
    """Train, then save where no file can grow beyond ``limit`` bytes."""
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        trainer = Trainer(config)
        for step in range(trainer.resume(), until):
            trainer.step(step)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            trainer.save(until)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def norms_and_parameters(
    rank: int, world_size: int, config: TrainConfig, until: int
) -> tuple[list[float], float, dict[str, bytes]]:
    """Resume, train; every step's gradient norm, a validation loss, and the parameters' bytes."""
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        trainer = Trainer(config)
        norms = [trainer.step(step).grad_norm for step in range(trainer.resume(), until)]
        parameters = {
            f"{index}.{name}": parameter.detach().numpy().tobytes()
            for index, chunk in enumerate(trainer.bare_chunks)
            for name, parameter in chunk.named_parameters()
        }
        return norms, trainer.evaluate()[0], parameters


def upcycled(
    rank: int, world_size: int, source: Path, config: TrainConfig, paper_start: bool = False
) -> Path:
    """The first checkpoint of an mHC run, made from a baseline's.

    ``paper_start`` leaves H_pre as it is initialised for training from scratch.
    """
    from mhc_megatron.convert import upcycle

    start = upcycle.start_as_plain
    if paper_start:
        upcycle.start_as_plain = lambda model: None
    try:
        world = World(rank=rank, local_rank=rank, world_size=world_size)
        return upcycle.upcycle(source, config, world)
    finally:
        upcycle.start_as_plain = start


def validation_from_plain(rank: int, world_size: int, config: TrainConfig, source: Path) -> float:
    """The validation loss of an mHC model into which a plain checkpoint was loaded."""
    from mhc_megatron.convert.upcycle import start_from_plain

    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        trainer = Trainer(config)
        start_from_plain(trainer.bare_chunks, source)
        return trainer.evaluate()[0]


def saved_model(rank: int, world_size: int, config: TrainConfig) -> dict[str, torch.Tensor]:
    """The model of the newest checkpoint, as one process sees it."""
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        trainer = Trainer(config)
        trainer.resume()
        [chunk] = trainer.bare_chunks
        return {k: v for k, v in chunk.state_dict().items() if isinstance(v, torch.Tensor)}


def resumed_validation(rank: int, world_size: int, config: TrainConfig) -> tuple[int, float]:
    """The step that the newest checkpoint is of, and its validation loss."""
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        trainer = Trainer(config)
        return trainer.resume(), trainer.evaluate()[0]


def validation_loss(rank: int, world_size: int, config: TrainConfig) -> float:
    """Validation loss of the untrained model."""
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        return Trainer(config).evaluate()[0]


def die_while_saving(rank: int, world_size: int, config: TrainConfig, until: int) -> None:
    """Train, then die in the middle of writing the checkpoint, as a killed job does."""
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        trainer = Trainer(config)
        for step in range(trainer.resume(), until):
            trainer.step(step)
        import mhc_megatron.training.checkpoint as checkpoint

        def killed(source: object, target: object) -> None:
            os._exit(9)

        checkpoint.os.replace = killed  # type: ignore[attr-defined, assignment]
        trainer.save(until)


def die_in_a_step(rank: int, world_size: int, config: TrainConfig, dying: int) -> None:
    """Train; in the second step, rank ``dying`` vanishes in the forward of a micro-batch."""
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        trainer = Trainer(config)
        trainer.step(0)
        if rank == dying:
            trainer.bare_chunks[0].register_forward_pre_hook(lambda *_: os._exit(7))
        trainer.step(1)


def stall_in_a_step(
    rank: int, world_size: int, config: TrainConfig, stalling: int, receiving: bool
) -> None:
    """Train; in its third forward of a micro-batch, rank ``stalling`` sleeps for good.

    Or, if ``receiving``, before that: in the wait for what this forward needs.
    """
    begun = 0

    def stall(waited: object, *arguments: object) -> None:
        nonlocal begun
        begun += isinstance(waited, DistributedReceipt if receiving else GPTModel)
        if begun == 3:
            time.sleep(3600)

    wait = DistributedReceipt.wait

    def stalled_wait(receipt: DistributedReceipt) -> torch.Tensor:
        stall(receipt)
        return wait(receipt)

    if rank == stalling and receiving:
        DistributedReceipt.wait = stalled_wait  # type: ignore[method-assign]
    elif rank == stalling:
        torch.nn.modules.module.register_module_forward_pre_hook(stall)
    world = World(rank=rank, local_rank=rank, world_size=world_size)
    train(config, world, StopRequest(()))


def spoil_steps(
    rank: int, world_size: int, config: TrainConfig, spoilt: dict[int, float]
) -> tuple[dict[int, float], str]:
    """Train a whole run; rank 0 multiplies the losses of some forwards.

    Args:
        spoilt: factor by the number of rank 0's forward in training, from 0.

    Returns:
        (the losses of rank 0's metrics by step, the message of the UserError that ended the run).
    """
    forwards = -1

    def spoil(module: torch.nn.Module, arguments: object, output: torch.Tensor) -> object:
        nonlocal forwards
        if not isinstance(module, GPTModel) or not module.training:
            return output
        forwards += 1
        return output * spoilt.get(forwards, 1.0)

    hook = torch.nn.modules.module.register_module_forward_hook(spoil)
    if rank != 0:
        hook.remove()
    message = ""
    try:
        train(config, World(rank=rank, local_rank=rank, world_size=world_size), StopRequest(()))
    except UserError as error:
        message = str(error)
    finally:
        hook.remove()
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    return {x["step"]: x["loss"] for x in map(json.loads, lines) if "loss" in x}, message


def corpus(folder: Path, *, documents: int = 60) -> tuple[str, str]:
    """A small corpus of two splits; returns their prefixes."""
    from mhc_megatron.data.prepare import prepare
    from mhc_megatron.data.tokenizer import load_tokenizer

    prefixes = []
    for split in ("train", "valid"):
        text = folder / f"{split}.txt"
        text.write_text(
            "\n".join(f"{split} line {i}: {i * i % 97} {i % 7}" for i in range(documents))
        )
        prefix = str(folder / split)
        prepare([text], prefix, tokenizer=load_tokenizer("byte"))
        prefixes.append(prefix)
    return prefixes[0], prefixes[1]
