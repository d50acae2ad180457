"""``mhc-megatron submit``: a recipe as a job of a SLURM cluster."""

import argparse
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mhc_megatron.errors import UserError
from mhc_megatron.launch.preflight import limit_flags
from mhc_megatron.launch.slurm import cluster
from mhc_megatron.launch.slurm.job import Job, Site
from mhc_megatron.launch.slurm.mounts import code_folders, container_mounts, run_folders
from mhc_megatron.launch.slurm.placement import grid, place
from mhc_megatron.launch.slurm.script import jobs_file, render_sbatch
from mhc_megatron.launch.slurm.variables import Variable, variables

if TYPE_CHECKING:
    from mhc_megatron.training.config import TrainConfig

_DESCRIPTION = """\
Queue the training of a recipe on a SLURM cluster. The number of nodes follows from the recipe's
layout; where every rank will run is shown before anything is queued. A job that is preempted, or
reaches its time limit, saves, is queued again and goes on.
"""

_EPILOG = """\
examples:
  mhc-megatron submit --recipe gpt-100m --partition h100 --time 4:00:00 --dry-run
  mhc-megatron submit --recipe my_package.recipes:big --account lab --modules cuda/12.9
  mhc-megatron submit --recipe gpt-100m --sweep optimizer.lr=3e-4,6e-4 seed=1,2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mhc-megatron submit``."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    run = parser.add_argument_group("run")
    run.add_argument("--recipe", required=True, help="as of mhc-megatron train")
    run.add_argument(
        "--set", dest="overrides", metavar="KEY=VALUE", nargs="+", action="extend", default=[]
    )
    run.add_argument("--out", help="run directory, seen by all nodes (overrides the recipe's)")
    run.add_argument(
        "--sweep",
        metavar="KEY=A,B",
        nargs="+",
        action="extend",
        default=[],
        help="a job array: a run for every combination, each in its own folder below the run's",
    )
    job = parser.add_argument_group("job")
    job.add_argument("--name", help="of the job (default: the run directory's)")
    job.add_argument(
        "--ranks-per-node", type=int, default=8, help="GPUs of a node (default: %(default)s)"
    )
    job.add_argument("--cpu", action="store_true", help="nodes without GPUs")
    for name in ("partition", "account", "qos"):
        job.add_argument(f"--{name}")
    job.add_argument("--container", help="[USER@][REGISTRY#]IMAGE[:TAG] or /PATH.sqsh, for pyxis")
    job.add_argument("--time", help="limit, as SLURM writes it: 24:00:00, 2-00")
    job.add_argument("--cores", type=int, help="of a rank")
    job.add_argument(
        "--warning-seconds",
        type=int,
        default=180,
        help="before the limit, to save in (default: %(default)s)",
    )
    job.add_argument(
        "--no-preflight", action="store_true", help="do not check the nodes before the run"
    )
    job.add_argument(
        "--limits",
        metavar="NAME=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="of that check: min_job_bandwidth=20 (GB/s); mhc-megatron preflight --help has all",
    )
    job.add_argument(
        "--max-left-out",
        type=int,
        default=4,
        help="unfit nodes that the job replaces by itself (default: %(default)s)",
    )
    job.add_argument("--no-requeue", action="store_true", help="end instead of going on later")
    for name, what in (
        ("exclude", "nodes not to use"),
        ("modules", "environment modules to load"),
        ("mounts", "SRC:DST, what the container sees besides the run, its data and this Python"),
    ):
        job.add_argument(f"--{name}", nargs="+", action="extend", default=[], help=what)
    job.add_argument("--env", metavar="NAME=VALUE", nargs="+", action="extend", default=[])
    job.add_argument(
        "--allow", choices=["tensor-across-nodes"], nargs="+", default=[], help="what is refused"
    )
    job.add_argument("--python", help="on the nodes, or in the container (default: this one)")
    job.add_argument("--dry-run", action="store_true", help="print the script, queue nothing")


def run(args: argparse.Namespace) -> int:
    """Check, show and queue."""
    job = make_job(args)
    script = render_sbatch(job)
    if args.dry_run:
        print(script, end="")
        print(grid(job.placement), file=sys.stderr)
        return 0
    cluster.check(job)
    folder = _make_folder(Path(job.out))
    print(grid(job.placement))
    number = cluster.submit(script)
    (folder / "job.sbatch").write_text(script)
    with open(jobs_file(job.out), "a") as file:
        file.write(f"{number}\n")
    tasks = f", {len(job.sweep)} tasks" if job.sweep else ""
    print(
        f"queued job {number}: {job.placement.num_nodes} nodes x {job.placement.ranks_per_node}"
        f" ranks{tasks}"
    )
    print(f"mhc-megatron status {job.out}   mhc-megatron logs {job.out}")
    return 0


def make_job(args: argparse.Namespace) -> Job:
    """The job that the arguments ask for; every field of the recipe is checked on the way.

    Raises:
        UserError: a bad recipe, layout, sweep or name.
    """
    from mhc_megatron.training.recipes import load_recipe

    config = _with(load_recipe(args.recipe), args.overrides)
    out = os.path.abspath(args.out or config.out)
    sweep = _combinations(args.sweep)
    configs = [_with(config, assignments) for assignments in sweep] or [config]
    for assignments, swept in zip(sweep, configs, strict=False):
        if swept.parallel != config.parallel:
            raise UserError(
                f"--sweep {' '.join(assignments)} changes the layout, and the tasks of an array "
                "have equal nodes; submit it apart"
            )
    placement = place(
        config.parallel,
        ranks_per_node=args.ranks_per_node,
        tensor_across_nodes="tensor-across-nodes" in args.allow,
    )
    site = Site(
        **{
            field.name: getattr(args, field.name)
            for field in dataclasses.fields(Site)
            if hasattr(args, field.name) and not isinstance(getattr(args, field.name), list)
        },
        gpus=not args.cpu,
        requeue=not args.no_requeue,
        exclude=tuple(args.exclude),
        modules=tuple(args.modules),
        mounts=_mounts(args, configs, out),
    )
    found = variables(config.parallel, on_gpu=not args.cpu, cores=args.cores)
    given = [_variable(text) for text in args.env]
    names = {variable.name for variable in given}
    outs = tuple(f"{out}/{index}" for index in range(len(sweep)))
    program = (args.python or sys.executable, "-m", "mhc_megatron.launch.cli")
    command = [*program, "train", "--recipe", args.recipe]
    if args.limits and args.no_preflight:
        raise UserError("--limits are of the preflight, and --no-preflight leaves it out")
    if args.overrides:
        command += ["--set", *args.overrides]
    if not sweep:
        command += ["--out", out]
    return Job(
        name=args.name or Path(out).name,
        site=site,
        placement=placement,
        variables=(*(v for v in found if v.name not in names), *given),
        out=out,
        command=tuple(command),
        preflight=(() if args.no_preflight else (*program, "preflight", *limit_flags(args.limits))),
        max_left_out=args.max_left_out,
        sweep=tuple(
            ("--set", *assignments, "--out", folder)
            for assignments, folder in zip(sweep, outs, strict=True)
        ),
        sweep_outs=outs,
    )


def _mounts(
    args: argparse.Namespace, configs: Sequence["TrainConfig"], out: str
) -> tuple[str, ...]:
    if args.container is None:
        return tuple(args.mounts)
    needed = run_folders(configs, out, in_tasks=bool(args.sweep))
    # A Python that is named is the image's.
    needed += [] if args.python else code_folders(args.recipe)
    return container_mounts(args.mounts, needed)


def _with(config: "TrainConfig", overrides: Sequence[str]) -> "TrainConfig":
    from mhc_megatron.training.overrides import apply_overrides

    return apply_overrides(config, list(overrides))


def _combinations(sweep: Sequence[str]) -> list[tuple[str, ...]]:
    """``["a=1,2", "b=3"]`` as ``[("a=1", "b=3"), ("a=2", "b=3")]``."""
    choices = []
    for text in sweep:
        key, equals, values = text.partition("=")
        found = [value for value in values.split(",") if value]
        if not equals or not key or not found:
            raise UserError(f"--sweep {text!r} is not KEY=A,B")
        choices.append([f"{key}={value}" for value in found])
    return list(itertools.product(*choices)) if choices else []


def _variable(text: str) -> Variable:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--env {text!r} is not NAME=VALUE")
    return Variable(name, value, "--env")


def _make_folder(out: Path) -> Path:
    folder = out / "slurm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_text(json.dumps(os.getpid()))
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"out={str(out)!r} cannot be written: {error.strerror}; choose another with --out"
        ) from None
    return folder
