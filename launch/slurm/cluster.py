"""The only callers of SLURM's commands: what a cluster has, submitting, asking about jobs."""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mhc_megatron.errors import UserError
from mhc_megatron.launch.slurm.job import Job

# The commands of one SLURM; stands in for ``run`` in tests.
Runner = Callable[[Sequence[str], str | None], str]


class Queued(NamedTuple):
    """A job, or a task of an array, as ``squeue`` tells of it.

    Attributes:
        job: the number that ``sbatch`` gave, one for all tasks of an array.
        task: its own name: the number, or number_index, or number_[indices] of those that wait.
        state, elapsed, nodes: what it does, for how long, and where or why not.
    """

    job: str
    task: str
    state: str
    elapsed: str
    nodes: str


def run(command: Sequence[str], text: str | None = None) -> str:
    """The output of a SLURM command, which gets ``text`` on its standard input.

    Raises:
        UserError: SLURM is not installed here, or the command's own complaint.
    """
    if shutil.which(command[0]) is None:
        raise UserError(
            f"{command[0]} is not on this machine's PATH; run this where jobs are submitted (a "
            "login node), or use --dry-run"
        )
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"{' '.join(command[:1])}: {' '.join(done.stderr.split())}")
    return done.stdout


def check(job: Job, runner: Runner = run) -> None:
    """Ask the cluster whether it can ever start this job.

    Raises:
        UserError: a partition that does not exist, fewer nodes than the layout needs, or an
            account where the cluster insists on one.
    """
    site, needed = job.site, job.placement.num_nodes
    partitions: dict[str, tuple[int, bool]] = {}
    for line in runner(["sinfo", "--noheader", "--format=%P|%D"], None).splitlines():
        shown, nodes = line.split("|")
        total, is_default = partitions.get(shown.rstrip("*"), (0, False))
        partitions[shown.rstrip("*")] = (total + int(nodes), is_default or shown.endswith("*"))
    defaults = [found for found, (_, is_default) in partitions.items() if is_default]
    name = site.partition or next(iter(defaults), None)
    if name is None:
        raise UserError(
            f"the cluster has no default partition; pass --partition, one of "
            f"{', '.join(partitions)}"
        )
    if name not in partitions:
        raise UserError(
            f"--partition={name!r} does not exist on this cluster; it has {', '.join(partitions)}"
        )
    if needed > partitions[name][0]:
        raise UserError(
            f"the layout needs {needed} nodes, and partition {name!r} has {partitions[name][0]}; "
            "change parallel.*, --ranks-per-node or --partition"
        )
    if site.account is None and _insists_on_account(runner):
        raise UserError(
            "this cluster enforces accounts (AccountingStorageEnforce) and none is given; pass "
            "--account"
        )


def submit(script: str, runner: Runner = run) -> str:
    """Queue a batch script; returns the job's number."""
    # --parsable prints "job" or "job;cluster".
    return runner(["sbatch", "--parsable"], script).strip().partition(";")[0]


def queued(jobs: Sequence[str], runner: Runner = run) -> list[Queued]:
    """Those of ``jobs`` that the cluster still knows as waiting or running."""
    text = runner(["squeue", "--noheader", "--format=%F|%i|%T|%M|%R", "--me"], None)
    rows = [Queued(*line.split("|", maxsplit=4)) for line in text.splitlines()]
    return [row for row in rows if row.job in jobs]


def _insists_on_account(runner: Runner) -> bool:
    for line in runner(["scontrol", "show", "config"], None).splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "AccountingStorageEnforce":
            return "associations" in value
    return False
