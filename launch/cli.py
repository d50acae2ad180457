"""The console command ``mhc-megatron``."""

import argparse
import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from mhc_megatron.errors import UserError

_PROGRAM = "mhc-megatron"


@dataclass(frozen=True, kw_only=True)
class Command:
    """A sub-command: where its arguments and its work are.

    Attributes:
        module: imported only when the command is chosen, so that help needs no torch.
        add_arguments: name of its ``(parser) -> None``.
        run: name of its ``(arguments) -> exit status``.
        examples: command lines below its help; empty when the module brings its own.
        passes_on: arguments that its parser does not know are Megatron's: ``run`` finds all of
            them, known and unknown, in ``argv``.
    """

    name: str
    summary: str
    module: str
    add_arguments: str = "add_arguments"
    run: str = "run"
    examples: tuple[str, ...] = ()
    passes_on: bool = False


COMMANDS = (
    Command(
        name="train",
        summary="train a GPT with hyper-connections (or without) from a recipe",
        module="mhc_megatron.training.cli",
        add_arguments="add_train_arguments",
        run="run_train",
        examples=(
            "mhc-megatron train --recipe stdlib-small",
            "mhc-megatron train --recipe stdlib-small --set parallel.tensor=1 steps=50",
            "mhc-megatron train --recipe my_package.recipes:big --out runs/big",
        ),
    ),
    Command(
        name="compare",
        summary="train several residual connections alike and draw them in one report",
        module="mhc_megatron.training.cli",
        add_arguments="add_compare_arguments",
        run="run_compare",
        examples=(
            "mhc-megatron compare",
            "mhc-megatron compare --variants plain,hc,mhc,identity --set steps=100",
        ),
    ),
    Command(
        name="pretrain",
        summary="train in Megatron's own loop: all of its arguments, and --mhc-*",
        module="mhc_megatron.pretrain.cli",
        examples=(
            "torchrun --nproc-per-node 8 -m mhc_megatron.launch.cli pretrain \\",
            "    --num-layers 24 --hidden-size 2048 ... --mhc-num-streams 4",
            "mhc-megatron pretrain --megatron-help     Megatron's own arguments",
        ),
        passes_on=True,
    ),
    Command(
        name="data",
        summary="turn text into training data, and look at what is there",
        module="mhc_megatron.data.cli",
    ),
    Command(
        name="convert",
        summary="start an mHC model from a plain checkpoint, translate names of state dicts",
        module="mhc_megatron.convert.cli",
    ),
    Command(
        name="submit",
        summary="queue the training of a recipe on a SLURM cluster",
        module="mhc_megatron.launch.slurm.submit",
    ),
    Command(
        name="preflight",
        summary="whether every node of a job is fit: srun starts it on all ranks",
        module="mhc_megatron.launch.preflight",
        examples=("srun mhc-megatron preflight --out /shared/runs/gpt --min-job-bandwidth 20",),
    ),
    Command(
        name="status",
        summary="the jobs of a run, how far it is, and what every rank does",
        module="mhc_megatron.launch.slurm.jobs",
        add_arguments="add_status_arguments",
        run="run_status",
        examples=("mhc-megatron status runs/gpt-100m",),
    ),
    Command(
        name="logs",
        summary="what the newest job of a submitted run has printed",
        module="mhc_megatron.launch.slurm.jobs",
        add_arguments="add_logs_arguments",
        run="run_logs",
        examples=("mhc-megatron logs runs/gpt-100m --follow",),
    ),
    Command(
        name="report",
        summary="draw the HTML report of finished or running trainings",
        module="mhc_megatron.report.cli",
        examples=("mhc-megatron report runs/stdlib-small",),
    ),
    Command(
        name="trace",
        summary="exposed communication and exposed mHC in a step that torch.profiler recorded",
        module="mhc_megatron.report.trace_cli",
        examples=(
            "mhc-megatron trace rank_0000.json.gz",
            "mhc-megatron trace rank_0000.json.gz --range '(0F7;7B3)' --json numbers.json",
        ),
    ),
    Command(
        name="simulate",
        summary="bubbles, step time and activations of a pipeline schedule, on paper",
        module="mhc_megatron.launch.simulate",
    ),
    Command(
        name="plan",
        summary="activation memory of a recipe under every recompute policy, on paper",
        module="mhc_megatron.launch.plan",
    ),
    Command(
        name="doctor",
        summary="say what this machine can run, and what is missing",
        module="mhc_megatron.launch.doctor",
    ),
)

_DESCRIPTION = """\
Manifold-Constrained Hyper-Connections (mHC) for released megatron-core.
"""

_EXAMPLES = """\
examples:
  mhc-megatron doctor                          what can this machine run?
  mhc-megatron train --recipe stdlib-small     train a small GPT on Python's own sources
  mhc-megatron COMMAND --help                  the arguments of one command

Exit status: 0 done, 1 a check failed, 2 the input has to change (one line says how),
130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``mhc-megatron`` with ``argv`` (default: the process's arguments); the exit status.

    A UserError becomes one line and status 2. Other exceptions are defects and keep their
    traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except UserError as error:
        print(f"{_PROGRAM}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{_PROGRAM}: interrupted", file=sys.stderr)
        return 130


def _dispatch(arguments: list[str]) -> int:
    commands = {command.name: command for command in COMMANDS}
    if not arguments or arguments[0] not in commands:
        return _without_command(arguments, list(commands))
    command = commands[arguments[0]]
    module = importlib.import_module(command.module)
    add_arguments: Callable[[argparse.ArgumentParser], None] = getattr(
        module, command.add_arguments
    )
    run: Callable[[argparse.Namespace], int] = getattr(module, command.run)
    parser = argparse.ArgumentParser(
        prog=f"{_PROGRAM} {command.name}",
        description=command.summary,
        epilog="\n  ".join(("examples:", *command.examples)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser)
    if command.passes_on:
        known, _ = parser.parse_known_args(arguments[1:])
        return run(argparse.Namespace(**vars(known), argv=arguments[1:]))
    return run(parser.parse_args(arguments[1:]))


def _without_command(arguments: list[str], names: list[str]) -> int:
    """``--help``, ``--version``, nothing at all, or a command that does not exist."""
    parser = _top_parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    if not arguments[0].startswith("-"):
        near = difflib.get_close_matches(arguments[0], names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"unknown command {arguments[0]!r}; {hint}commands: {', '.join(names)} "
            f"({_PROGRAM} --help explains them)"
        )
    parser.parse_args(arguments)  # prints and exits for --help, --version and unknown options
    raise UserError(f"a command must come first; commands: {', '.join(names)}")


def _top_parser() -> argparse.ArgumentParser:
    width = max(len(command.name) for command in COMMANDS)
    table = "\n".join(f"  {command.name:<{width}}  {command.summary}" for command in COMMANDS)
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        usage=f"{_PROGRAM} COMMAND [arguments]",
        description=_DESCRIPTION,
        epilog=f"commands:\n{table}\n\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def _version() -> str:
    return version("mhc-megatron")


def _one_line(error: UserError) -> str:
    return " ".join(str(error).split("\n"))


if __name__ == "__main__":
    sys.exit(main())
