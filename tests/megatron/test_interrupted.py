"""``mhc-megatron train`` as users start it: told to stop by SIGTERM, and on a disk that is full."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import training

from mhc_megatron.training.manifest import (
    Manifest,
    list_checkpoints,
    read_manifest,
    wrong_checksum,
    wrong_size,
)

# What the release of megatron-core cannot change.
pytestmark = pytest.mark.one_core

# As srun starts a lone rank.
SLURM = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1",
    "SLURM_JOB_ID": "7",
}  # fmt: skip


def command(tmp_path: Path, out: Path, *more: str) -> list[str]:
    train, valid = training.corpus(tmp_path)
    settings = [
        "model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=2",
        "model.ffn_hidden_size=64", "model.seq_length=32", "mhc.sinkhorn_iterations=3",
        "parallel.tensor=1", "parallel.sequence=False", "micro_batch_size=1", "global_batch_size=2",
        "eval_interval=0", "eval_iters=1", f"data.train={train}", f"data.valid={valid}", *more,
    ]  # fmt: skip
    words = [sys.executable, "-m", "mhc_megatron.launch.cli", "train", "--recipe", "stdlib-small"]
    return [*words, "--out", str(out), "--set", *settings]


def losses(out: Path) -> dict[int, float]:
    """By step."""
    if not (out / "metrics.jsonl").exists():
        return {}
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_sigterm_of_a_preemption_saves_and_the_run_goes_on_where_it_was(tmp_path: Path) -> None:
    settings = ["steps=30", "save_interval=0"]
    out = tmp_path / "run"
    told = command(tmp_path, out, *settings)
    rank = subprocess.Popen(
        told,
        env={**os.environ, **SLURM},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while len(losses(out)) < 3:
        assert rank.poll() is None and time.monotonic() < deadline, rank.communicate()[0]
        time.sleep(0.05)
    rank.send_signal(signal.SIGTERM)
    said, _ = rank.communicate(timeout=120)
    assert rank.returncode == 0, said
    assert json.loads((out / "run.json").read_text())["status"] == "stopped"
    (out / "slurm" / "requeue").unlink()  # as the batch script does
    [saved] = list_checkpoints(out / "checkpoints")
    stopped_after = int(saved.name.removeprefix("step_"))
    assert 3 <= stopped_after < 30 and list(losses(out)) == list(range(1, stopped_after + 1))
    assert f"told to stop: saved after step {stopped_after} of 30" in said

    done = subprocess.run(told, env={**os.environ, **SLURM}, capture_output=True, text=True)
    assert done.returncode == 0 and f"resumes after step {stopped_after}" in done.stderr, (
        done.stderr
    )
    assert list(losses(out)) == list(range(1, 31)) and not (out / "slurm" / "requeue").exists()


def test_a_disk_without_space_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """A file system of its own, in the namespace of this test's processes, holds one checkpoint."""
    out, left = tmp_path / "run", tmp_path / "left"
    folder = out / "checkpoints"
    folder.mkdir(parents=True)
    script = f'mount -t tmpfs -o size=1400k tmpfs {folder} && "$@"; echo $?; cp -r {folder} {left}'
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    train = command(tmp_path, out, "steps=2", "save_interval=1")
    done = subprocess.run([*namespace, *train], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["2"], done.stderr
    # torch's archive writer keeps no more of the error than that it failed.
    why = r"(\[Errno 28\] No space left on device|the file writer failed, as on a full disk)"
    assert re.search(
        rf"^mhc-megatron: error: checkpoint {folder}/step_00000002 cannot be written: {why} "
        rf"\(\d MiB are free in {folder}\); the checkpoints before it are intact\. Make room there",
        done.stderr,
        re.MULTILINE,
    ), done.stderr
    [kept] = left.iterdir()
    manifest = read_manifest(kept)
    assert kept.name == "step_00000001" and isinstance(manifest, Manifest)
    assert wrong_size(kept, manifest) is None
    assert wrong_checksum(kept, manifest, manifest.sizes) is None
