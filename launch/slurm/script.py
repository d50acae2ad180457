"""The batch script of a job, as text. Pure: the golden files of its tests are what sbatch gets."""

import shlex
from collections.abc import Iterator

from mhc_megatron.launch.slurm.job import Job
from mhc_megatron.launch.slurm.left_out import leave_out

# Ports that no system service uses; jobs that share a node have different numbers.
_FIRST_PORT, _PORTS = 20000, 20000

# 128 + SIGUSR1: what srun returns for a rank that was told to stop before it listened, as in the
# preflight and while Python starts.
_TOLD_EARLY = 138
_ON_ALL_RANKS = f"""\
# A run that is told to stop before it listens has nothing to save, and goes on later as well.
on_all_ranks() {{
  local status=0
  "$@" || status=$?
  if [ "$status" -eq {_TOLD_EARLY} ]; then
    echo "told to stop before the run began: job $job is queued again" >&2
    scontrol requeue "$job"
  fi
  return "$status"
}}""".splitlines()


def requeue_request(out: str) -> str:
    """The file by which a run that has saved asks for its job to be queued again.

    Args:
        out: the run's folder.
    """
    return f"{out}/slurm/requeue"


def jobs_file(out: str) -> str:
    """The file with the numbers of a run's jobs, a line each and some twice, the newest last.

    Args:
        out: the run's folder; of an array the one above its tasks'.
    """
    return f"{out}/slurm/jobs.txt"


def render_sbatch(job: Job) -> str:
    """The script; every value is a literal of its shell, or was refused by ``Job``."""
    return "\n".join([*_head(job), "", *_environment(job), "", *_body(job), ""])


def _head(job: Job) -> Iterator[str]:
    yield "#!/bin/bash"
    site, placement = job.site, job.placement
    log = "%A_%a.log" if job.sweep else "%j.log"
    flags = {
        "job-name": job.name,
        "nodes": placement.num_nodes,
        "ntasks-per-node": placement.ranks_per_node,
        "cpus-per-task": site.cores,
        "gpus-per-node": placement.ranks_per_node if site.gpus else None,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "time": site.time,
        "exclude": ",".join(site.exclude) or None,
        "array": f"0-{len(job.sweep) - 1}" if job.sweep else None,
        # Where a % of the folder's name is not a pattern.
        "output": f"{job.out.replace('%', '%%')}/slurm/{log}",
        "open-mode": "append",
        # To the ranks, not to this script.
        "signal": f"USR1@{site.warning_seconds}",
    }
    for name, value in flags.items():
        if value is not None:
            yield f"#SBATCH --{name}={value}"
    yield "#SBATCH --requeue" if site.requeue else "#SBATCH --no-requeue"


def _environment(job: Job) -> Iterator[str]:
    yield "set -euo pipefail"
    for variable in job.variables:
        yield f"export {variable.name}={shlex.quote(variable.value)}  # {variable.reason}"
    # The address by which SLURM itself reaches the node; its name, unless the site says otherwise.
    yield 'first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"'
    address = r"s/.*NodeAddr=\([^ ]*\).*/\1/p"
    yield f'MASTER_ADDR="$(scontrol show node "$first" | sed -n "{address}")"'
    yield "export MASTER_ADDR"
    yield f'export MASTER_PORT="$(({_FIRST_PORT} + SLURM_JOB_ID % {_PORTS}))"'
    for module in job.site.modules:
        yield f"module load {shlex.quote(module)}"


def _body(job: Job) -> Iterator[str]:
    yield f"command=({shlex.join(job.command)})"
    yield f"out={shlex.quote(job.out)}"
    # Of an array this task alone: the number of one of them stands for the array as well.
    number = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if job.sweep else "$SLURM_JOB_ID"
    yield f'job="{number}"'
    if job.sweep:
        yield 'case "$SLURM_ARRAY_TASK_ID" in'
        for index, (arguments, out) in enumerate(zip(job.sweep, job.sweep_outs, strict=True)):
            yield f"{index}) command+=({shlex.join(arguments)}); out={shlex.quote(out)} ;;"
        yield "esac"
    step = ["srun", "--kill-on-bad-exit=1"]
    if job.site.container is not None:
        step.append(f"--container-image={job.site.container}")
    if job.site.mounts:
        step.append(f"--container-mounts={','.join(job.site.mounts)}")
    request = requeue_request("$out")
    yield f'mkdir -p "$out/slurm" && rm -f "{request}"'
    # Also of a job that was queued by hand, with this script.
    yield f'echo "${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}" >>{shlex.quote(jobs_file(job.out))}'
    if job.site.requeue:
        yield from _ON_ALL_RANKS
    ranks = shlex.join([*(["on_all_ranks"] if job.site.requeue else []), *step])
    if job.preflight:
        yield from _checked(job, ranks)
    yield f'{ranks} "${{command[@]}}"'
    if job.site.requeue:
        yield "# A run that was told to stop has saved, and goes on when the job runs again."
        yield f'if [ -e "{request}" ]; then scontrol requeue "$job"; fi'


def _checked(job: Job, ranks: str) -> Iterator[str]:
    """Nodes that are not fit are named, and end the job before it trains, or put it off."""
    yield from leave_out(job)
    yield "status=0"
    yield f'{ranks} {shlex.join(job.preflight)} --out "$out" --unfit "$unfit" || status=$?'
    yield 'if [ "$status" -ne 0 ]; then'
    yield "  leave_out"
    yield '  exit "$status"'
    yield "fi"
