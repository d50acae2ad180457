"""Training on two SLURM nodes: submitted, told to stop, queued again, and equal to a local run."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.slurm import Cluster, processes

TINY = [
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "model.ffn_hidden_size=64",
    "model.seq_length=32",
    "mhc.sinkhorn_iterations=3",
    "micro_batch_size=1",
    "global_batch_size=4",
    "eval_interval=0",
    "eval_iters=1",
    "save_interval=0",
]
STEPS = 40
RECIPE = ["--recipe", "stdlib-small-dualpipe-v", "--set", *TINY, f"steps={STEPS}"]


ON_TWO_NODES = ["--cpu", "--ranks-per-node", "1", "--cores", "1", "--partition", "main"]


def mhc_megatron(cluster: Cluster, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mhc_megatron.launch.cli", *words],
        capture_output=True,
        text=True,
        env=cluster.environment,
        cwd=cluster.folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def submitted(out: Path) -> str:
    """The number of the run's only job, which writes it again when it starts."""
    [job] = set((out / "slurm" / "jobs.txt").read_text().split())
    return job


def losses(out: Path) -> dict[int, float]:
    """By step."""
    if not (out / "metrics.jsonl").exists():
        return {}
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def wait(cluster: Cluster, out: Path, done: Callable[[], bool], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        logs = "\n".join(path.read_text()[-3000:] for path in (out / "slurm").glob("*.log"))
        assert time.monotonic() < deadline, f"{logs}\n{cluster.logs()}"
        time.sleep(0.2)


def state(cluster: Cluster, job: str) -> str:
    text = cluster.command("scontrol", "show", "job", "--oneliner", job)
    return text.split("JobState=")[1].split()[0]


def nodes(cluster: Cluster) -> list[str]:
    """The states of n1 and n2."""
    return cluster.command("sinfo", "--noheader", "--Node", "--format=%T").split()


def start_again(cluster: Cluster, job: str) -> None:
    """At once: SLURM leaves a job that is queued again alone for two minutes."""
    # slurmd takes a job that starts again in the second in which it ended for the one that ended.
    cluster.command("scontrol", "update", f"JobId={job}", "StartTime=now+2")


@pytest.fixture(scope="module")
def alone(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the run without interruption and without SLURM."""
    out = tmp_path_factory.mktemp("alone") / "run"
    mhc_megatron(cluster, "train", *RECIPE, "--out", str(out))
    return losses(out)


def test_a_run_that_is_told_to_stop_goes_on_where_it_was(
    cluster: Cluster, tmp_path: Path, alone: dict[int, float]
) -> None:
    out = tmp_path / "run"
    said = mhc_megatron(cluster, "submit", *RECIPE, "--out", str(out), *ON_TWO_NODES)
    assert "node 0 | 0 p0\nnode 1 | 1 p1" in said
    job = submitted(out)
    assert f"queued job {job}: 2 nodes x 1 ranks" in said

    wait(cluster, out, lambda: len(losses(out)) >= 3)
    assert f"job {job}: running" in mhc_megatron(cluster, "status", str(out))
    cluster.command("scancel", "--signal=USR1", job)
    wait(cluster, out, lambda: (out / "slurm" / "requeue").exists())
    wait(cluster, out, lambda: state(cluster, job) == "PENDING")
    saved = json.loads((out / "run.json").read_text())
    assert saved["status"] == "stopped"
    [checkpoint] = (out / "checkpoints").glob("step_*")
    stopped_after = int(checkpoint.name.removeprefix("step_"))
    assert 3 <= stopped_after < STEPS

    start_again(cluster, job)
    wait(cluster, out, lambda: state(cluster, job) == "COMPLETED")
    assert not (out / "slurm" / "requeue").exists()
    log = mhc_megatron(cluster, "logs", str(out))
    assert f"told to stop: saved after step {stopped_after} of {STEPS}" in log
    assert f"resumes after step {stopped_after}" in log
    assert log.count("preflight: fit: 2 rank(s) on 2 node(s), all-reduce of all ") == 2

    assert losses(out) == alone
    assert list(losses(out)) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("lost", ["n1", "n2"], ids=["with_the_batch_script", "without"])
def test_a_lost_node_costs_no_committed_step(
    lost: str, cluster: Cluster, tmp_path: Path, alone: dict[int, float]
) -> None:
    out = tmp_path / "run"
    mhc_megatron(
        cluster, "submit", *RECIPE, "save_interval=4", "--out", str(out), *ON_TWO_NODES,
        "--no-preflight",
    )  # fmt: skip
    job = submitted(out)
    wait(cluster, out, lambda: len(losses(out)) >= 9)
    cluster.lose_node(lost, job)
    committed = sorted(path.name for path in (out / "checkpoints").glob("step_*"))[-1]
    last = int(committed.removeprefix("step_"))
    assert 8 <= last < STEPS
    wait(cluster, out, lambda: state(cluster, job) == "PENDING")
    wait(cluster, out, lambda: nodes(cluster)[int(lost[1]) - 1].startswith("down"))

    cluster.start("slurmd", "-D", "-N", lost)
    wait(cluster, out, lambda: nodes(cluster) == ["idle", "idle"])
    start_again(cluster, job)
    wait(cluster, out, lambda: state(cluster, job) == "COMPLETED")
    log = mhc_megatron(cluster, "logs", str(out))
    assert f"resumes after step {last}" in log
    assert losses(out) == alone
    if lost == "n2":
        # The rank that is left, srun or SLURM says it first, and then the job may be over.
        assert "DUE TO NODE FAILURE" in log or re.search(r"\bn2\b", log), log


def test_a_run_that_is_told_to_stop_before_it_listens_is_queued_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    mhc_megatron(cluster, "submit", *RECIPE, "--out", str(out), *ON_TWO_NODES)
    job = submitted(out)
    preflight = (f"SLURM_JOB_ID={job}", "SLURM_STEP_ID=0", "SLURM_PROCID=0")
    wait(cluster, out, lambda: bool(processes(*preflight)))
    cluster.command("scancel", "--signal=USR1", job)
    wait(cluster, out, lambda: state(cluster, job) == "PENDING")
    cluster.command("scancel", job)
    log = mhc_megatron(cluster, "logs", str(out))
    assert f"told to stop before the run began: job {job} is queued again" in log
    assert losses(out) == {}


def test_a_run_that_fails_by_itself_is_not_queued_again(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "run"
    mhc_megatron(
        cluster, "submit", *RECIPE, "optimizer.lr=1e30", "optimizer.warmup_steps=0", "--out",
        str(out), *ON_TWO_NODES, "--no-preflight",
    )  # fmt: skip
    job = submitted(out)
    wait(cluster, out, lambda: state(cluster, job) == "FAILED")
    log = mhc_megatron(cluster, "logs", str(out))
    assert "stopped before anything was saved" in log and "queued again" not in log


def test_a_node_that_is_not_fit_is_left_out_and_another_trains(
    cluster: Cluster, tmp_path: Path
) -> None:
    # A folder's name is no pattern of SLURM.
    out, first, python = tmp_path / "run%j", tmp_path / "first", tmp_path / "python"
    # The node that gets the job first has lost its GPU.
    python.write_text(
        f"#!/bin/bash\n[ -e {first} ] || echo $SLURMD_NODENAME >{first}\nshift 2\n"
        f"PYTHONPATH={Path(__file__).parents[1]} exec {sys.executable} -m helpers.lost_gpu "
        f'SLURMD_NODENAME=$(cat {first}) "$@"\n'
    )
    python.chmod(0o755)
    mhc_megatron(
        cluster, "submit", "--recipe", "stdlib-small", "--set", *TINY, "parallel.tensor=1",
        "parallel.sequence=False", "steps=2", "--out", str(out), *ON_TWO_NODES,
        "--python", str(python),
    )  # fmt: skip
    job = submitted(out)
    wait(cluster, out, lambda: state(cluster, job) == "PENDING" and first.exists())
    lost = first.read_text().strip()
    other = {"n1": "n2", "n2": "n1"}[lost]
    assert f" ExcNodeList={lost} " in cluster.command("scontrol", "show", "job", "-o", job)
    reason = "rank 0 fails: CUDA error: GPU is lost"
    said = mhc_megatron(cluster, "status", str(out))
    assert f"{out}: job {job} left out node {lost}: {reason}" in said

    start_again(cluster, job)
    wait(cluster, out, lambda: state(cluster, job) == "COMPLETED")
    assert f" NodeList={other} " in cluster.command("scontrol", "show", "job", "-o", job)
    assert list(losses(out)) == [1, 2]
    log = mhc_megatron(cluster, "logs", str(out))
    assert f"node {lost}: {reason} (leave it out with --exclude {lost})" in log
    assert f"job {job} is queued again without {lost}" in log
