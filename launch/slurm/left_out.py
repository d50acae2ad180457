"""The part of a batch script that leaves out nodes which the preflight has found unfit. Pure."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from mhc_megatron.launch.slurm.job import Job

# In <out>/slurm: what the preflight found, "node <tab> why"; and for good, "job <tab> node <tab>
# why", of all that was left out.
UNFIT, LEFT_OUT = "unfit", "left_out"

# SLURM changes the nodes to leave out of jobs that wait, and a job that is queued again counts as
# one while this script still runs: it ends KillWait (30 s) after SIGTERM, and the job does not
# start again before two minutes have passed. Each round leaves out at least one node more, so
# that the rounds end.
_LEAVE_OUT = r"""
# What the preflight found unfit is left out: other nodes of the partition take its place when the
# job is queued again. Where none can, the command that starts it without them is said.
leave_out() {
  local before now all list others why="$refusal"
  [ -s "$unfit" ] || return 0
  now="$(cut -f 1 "$unfit")"
  before="$(awk -F '\t' -v job="$job" '$1 == job { print $2 }' "$left_out")"
  all="$(printf '%s\n' "$before" "$now" | sed '/^$/d' | sort -u)"
  list="$(printf '%s\n' "$asked" "$all" | sed '/^$/d' | paste -sd ,)"
  others="$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format=%N | sort -u |
    grep -cvxF "$(scontrol show hostnames "$list")" || true)"
  if [ -n "$why" ]; then :
  elif grep -qxF "$now" <<<"$before"; then
    why="SLURM has given it a node that it had left out"
  elif [ "$(wc -l <<<"$all")" -gt "$most" ]; then
    why="it leaves out $most nodes at most (--max-left-out)"
  elif [ "$others" -lt "$SLURM_JOB_NUM_NODES" ]; then
    why="partition $SLURM_JOB_PARTITION has only $others other node(s)"
  fi
  if [ -n "$why" ]; then
    why="$why. To start it without them: sbatch ${task}--exclude=$list $script"
    echo "job $job is not queued again: $why" >&2
    return 0
  fi
  awk -v job="$job" '{ print job "\t" $0 }' "$unfit" >>"$left_out"
  echo "job $job is queued again without $list" >&2
  trap '' TERM
  scontrol requeue "$job"
  scontrol update JobId="$job" ExcNodeList="$list"
}""".strip().splitlines()


def leave_out(job: Job) -> Iterator[str]:
    """Lines that define the shell function ``leave_out`` and what it knows of the job."""
    yield f'unfit="$out/slurm/{UNFIT}"'
    yield f'left_out="$out/slurm/{LEFT_OUT}"'
    yield 'rm -f "$unfit" && touch "$left_out"'
    yield f"asked={shlex.quote(','.join(job.site.exclude))}"
    yield f"most={job.max_left_out}"
    refusal = "" if job.site.requeue else "it was submitted with --no-requeue"
    yield f"refusal={shlex.quote(refusal)}"
    yield f"script={shlex.quote(f'{job.out}/slurm/job.sbatch')}"
    yield 'task="--array=$SLURM_ARRAY_TASK_ID "' if job.sweep else 'task=""'
    yield from _LEAVE_OUT


def read_left_out(out: Path) -> list[tuple[str, str, str]]:
    """Job, node and reasons of all nodes that jobs of a run have left out, oldest first.

    Args:
        out: the run's folder.
    """
    try:
        lines = (out / "slurm" / LEFT_OUT).read_text().splitlines()
    except FileNotFoundError:
        return []
    return [(job, node, why) for job, node, why in (line.split("\t", 2) for line in lines)]
