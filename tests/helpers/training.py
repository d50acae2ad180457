"""Jobs for the worker pool: stretches of training and their losses."""

import os
from pathlib import Path

from mhc_megatron.launch.environment import World
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.runtime import distributed_runtime
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
