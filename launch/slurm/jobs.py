"""``mhc-megatron status`` and ``mhc-megatron logs``: the jobs of a run."""

import argparse
import json
import time
from pathlib import Path

from mhc_megatron.errors import UserError
from mhc_megatron.launch.slurm import cluster
from mhc_megatron.launch.slurm.left_out import read_left_out
from mhc_megatron.launch.slurm.script import jobs_file
from mhc_megatron.report import heartbeat

_POLL_SECONDS = 1.0


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mhc-megatron status``."""
    parser.add_argument("out", type=Path, help="a run directory of mhc-megatron submit or train")


def run_status(args: argparse.Namespace) -> int:
    """Print the run's jobs that wait or run, its last step, and what every rank does."""
    submitted = Path(jobs_file(str(args.out))).is_file()
    if submitted or not heartbeat.read_beats(args.out):
        jobs = _jobs(args.out)
        rows = cluster.queued(jobs)
        for row in rows:
            task = row.task.partition("_")[2]
            run = f" ({args.out / task})" if task.isdecimal() else ""
            print(f"job {row.task}{run}: {row.state.lower()}, {row.elapsed}, {row.nodes}")
        if not rows:
            print(f"no job of {args.out} waits or runs (queued so far: {', '.join(jobs)})")
    tasks = [path for path in args.out.glob("[0-9]*") if path.name.isdecimal()]
    for folder in [args.out, *sorted(tasks, key=lambda path: int(path.name))]:
        line, ranks = _last_step(folder), heartbeat.describe(folder, now=time.time())
        if line is not None:
            print(
                f"{folder}: step {line['step']}, loss {line['loss']:.4f}, {line['step_ms']:.0f} ms"
            )
        elif ranks:
            print(f"{folder}: no step yet")
        for number, node, why in read_left_out(folder):
            print(f"{folder}: job {number} left out node {node}: {why}")
        if ranks:
            print(ranks)
    return 0


def add_logs_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mhc-megatron logs``."""
    parser.add_argument("out", type=Path, help="a run directory of mhc-megatron submit")
    parser.add_argument("--follow", action="store_true", help="wait for more until interrupted")


def run_logs(args: argparse.Namespace) -> int:
    """Print the logs of the run's newest job; an array has one for each task."""
    job = _jobs(args.out)[-1]
    folder = args.out / "slurm"
    logs = [*folder.glob(f"{job}.log"), *sorted(folder.glob(f"{job}_*.log"))]
    if not logs:
        raise UserError(f"job {job} has no log yet in {folder}; see mhc-megatron status")
    read = dict.fromkeys(logs, 0)
    while True:
        for log in logs:
            with log.open(errors="replace") as file:
                file.seek(read[log])
                if (text := file.read()) and len(logs) > 1:
                    print(f"==> {log.name} <==")
                print(text, end="", flush=True)
                read[log] = file.tell()
        if not args.follow:
            return 0
        time.sleep(_POLL_SECONDS)


def _jobs(out: Path) -> list[str]:
    file = Path(jobs_file(str(out)))
    try:
        return list(dict.fromkeys(file.read_text().split()))
    except FileNotFoundError:
        raise UserError(
            f"{str(out)!r} has no {file.name} of mhc-megatron submit; name the run directory that "
            "was submitted"
        ) from None


def _last_step(folder: Path) -> dict | None:
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return None
    steps = [line for line in map(json.loads, lines) if "loss" in line]
    return steps[-1] if steps else None
