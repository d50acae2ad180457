"""``mhc-megatron pretrain``: ``megatron.training.pretrain`` with hyper-connections."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from mhc_megatron.errors import UserError
from mhc_megatron.launch.environment import (
    World,
    training_loop_environment,
    world_from_environment,
)
from mhc_megatron.pretrain.options import add_mhc_args, mhc_from_args

# What megatron-core cannot do without a GPU, put before the user's own arguments.
CPU_ARGUMENTS = (
    "--distributed-backend=gloo",
    "--transformer-impl=local",
    "--use-cpu-initialization",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-rope-fusion",
    "--no-persist-layer-norm",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The ``--mhc-*`` flags; all others are Megatron's."""
    add_mhc_args(parser)
    parser.add_argument(
        "--megatron-help", action="store_true", help="print the arguments of Megatron, and stop"
    )


def run(arguments: argparse.Namespace) -> int:
    """Train as one process of the run that torchrun or srun started, or as the only one.

    Returns:
        0, or 2 after a UserError (rank 0 prints it as one line).
    """
    mhc_from_args(arguments)  # before the slow imports
    world = world_from_environment()
    argv = ["--help"] if arguments.megatron_help else arguments.argv
    try:
        train(argv, world)
    except UserError as error:
        if world is None:
            raise
        if world.rank == 0:
            print(f"mhc-megatron: error: {error}", file=sys.stderr)
        return 2
    return 0


def train(argv: Sequence[str], world: World | None) -> None:
    """Run Megatron's loop in this process, on the CPU where there is no GPU.

    Args:
        argv: Megatron's arguments and the ``--mhc-*`` flags.
        world: this process among the run's; None if it is the only one.

    Raises:
        UserError: the installed megatron-core has no training loop of 0.19, or something does not
            combine; before the first step.
    """
    argv = for_this_machine(argv)
    with training_loop(world) as gpt:
        gpt.run(argv, world)


def for_this_machine(argv: Sequence[str]) -> list[str]:
    """``argv``, after ``CPU_ARGUMENTS`` where there is no GPU."""
    import torch

    return list(argv) if torch.cuda.is_available() else [*CPU_ARGUMENTS, *argv]


@contextlib.contextmanager
def training_loop(world: World | None) -> Iterator[ModuleType]:
    """The module ``mhc_megatron.pretrain.gpt``, in surroundings where Megatron's loop runs.

    Args:
        world: this process among the run's; None if it is the only one.
    """
    from mhc_megatron.cudnn import load_torchs_cudnn

    load_torchs_cudnn()  # before megatron-core imports Transformer Engine
    import megatron.core

    from mhc_megatron.megatron.compat import require_training_loop, typing_override
    from mhc_megatron.megatron.cpu_runtime import training_loop_cpu_runtime

    require_training_loop()
    with typing_override():
        from mhc_megatron.pretrain import gpt
    datasets = Path(megatron.core.__file__).parent / "datasets"
    with training_loop_environment(world, datasets=datasets), training_loop_cpu_runtime():
        yield gpt
