"""What a batch script does with nodes that the preflight has found unfit, with SLURM's commands
played by stubs. ``tests/slurm`` has the same with SLURM."""

import subprocess
from argparse import ArgumentParser
from pathlib import Path

import pytest

from mhc_megatron.launch.cli import main
from mhc_megatron.launch.slurm import submit
from mhc_megatron.launch.slurm.left_out import read_left_out
from mhc_megatron.launch.slurm.script import render_sbatch

_HOSTNAMES = 'if [ "$2" = hostnames ]; then tr , "\\n" <<<"$3"; else echo NodeAddr=here; fi'
_STUBS = {
    "srun": 'case "$*" in *preflight*) printf "$UNFIT" >"$OUT/slurm/unfit"; exit 1;; esac',
    "sinfo": 'printf "%s\\n" $NODES',
    "scontrol": f'if [ "$1" = show ]; then {_HOSTNAMES}; else echo "scontrol $*"; fi',
}


class Script:
    """A rendered script and where it runs."""

    def __init__(self, tmp_path: Path, *words: str) -> None:
        parser = ArgumentParser()
        submit.add_arguments(parser)
        self.out = tmp_path / "run"
        self.text = render_sbatch(
            submit.make_job(
                parser.parse_args(["--recipe", "gpt-100m", "--out", str(self.out), *words])
            )
        )
        (self.out / "slurm").mkdir(parents=True)
        self.stubs = tmp_path / "bin"
        self.stubs.mkdir()
        for name, body in _STUBS.items():
            (self.stubs / name).write_text(f"#!/bin/bash\n{body}\n")
            (self.stubs / name).chmod(0o755)

    def run(self, unfit: str, *, nodes: str = "n1 n2 n3", **variables: str) -> tuple[int, list]:
        """Its exit status, and the lines of both outputs."""
        task = variables.get("SLURM_ARRAY_TASK_ID")
        environment = {
            "PATH": f"{self.stubs}:/usr/bin:/bin",
            "UNFIT": unfit,
            "OUT": f"{self.out}/{task}" if task else str(self.out),
            "NODES": nodes,
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n1,n2",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_PARTITION": "main",
            **variables,
        }
        done = subprocess.run(
            ["bash"], input=self.text, text=True, capture_output=True, env=environment
        )
        return done.returncode, (done.stderr + done.stdout).splitlines()


def test_other_nodes_take_their_place_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(tmp_path, "--exclude", "n9")
    assert script.run("n2\tGPU 0 fails: lost\n") == (
        1,
        [
            "job 7 is queued again without n9,n2",
            "scontrol requeue 7",
            "scontrol update JobId=7 ExcNodeList=n9,n2",
        ],
    )
    found = [("7", "n2", "GPU 0 fails: lost")]
    assert read_left_out(script.out) == found
    again = f"sbatch --exclude=n9,n2 {script.out}/slurm/job.sbatch"
    assert script.run("n2\tGPU 0 fails: lost\n") == (
        1,
        [
            "job 7 is not queued again: SLURM has given it a node that it had left out. To start "
            f"it without them: {again}"
        ],
    )
    assert read_left_out(script.out) == found

    # What another job has left out may have been repaired.
    _, lines = script.run("n2\tslow\n", SLURM_JOB_ID="8")
    assert lines[0] == "job 8 is queued again without n9,n2"
    monkeypatch.setenv("PATH", str(script.stubs))
    (script.stubs / "squeue").write_text("#!/bin/bash\n")
    (script.stubs / "squeue").chmod(0o755)
    assert main(["status", str(script.out)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"no job of {script.out} waits or runs (queued so far: 7, 8)",
        f"{script.out}: job 7 left out node n2: GPU 0 fails: lost",
        f"{script.out}: job 8 left out node n2: slow",
    ]


@pytest.mark.parametrize(
    ("words", "nodes", "why"),
    [
        ((), "n1 n2", "partition main has only 1 other node(s)"),
        (("--max-left-out", "0"), "n1 n2 n3", "it leaves out 0 nodes at most (--max-left-out)"),
        (("--no-requeue",), "n1 n2 n3", "it was submitted with --no-requeue"),
    ],
)
def test_where_no_node_can_take_the_place_the_command_is_said(
    tmp_path: Path, words: tuple[str, ...], nodes: str, why: str
) -> None:
    script = Script(tmp_path, *words)
    assert script.run("n2\tslow\n", nodes=nodes) == (
        1,
        [
            f"job 7 is not queued again: {why}. To start it without them: sbatch --exclude=n2 "
            f"{script.out}/slurm/job.sbatch"
        ],
    )
    assert read_left_out(script.out) == []


def test_the_rounds_end(tmp_path: Path) -> None:
    script = Script(tmp_path, "--max-left-out", "2")
    nodes = " ".join(f"n{index}" for index in range(9))
    for node, again in (("n1", True), ("n2", True), ("n3", False)):
        _, lines = script.run(f"{node}\tslow\n", nodes=nodes)
        assert ("scontrol requeue 7" in lines) == again, lines
    assert lines[0].endswith(f"sbatch --exclude=n1,n2,n3 {script.out}/slurm/job.sbatch")


def test_a_preflight_that_names_no_node_ends_the_job(tmp_path: Path) -> None:
    assert Script(tmp_path).run("") == (1, [])


def test_a_task_of_an_array_is_queued_again_alone(tmp_path: Path) -> None:
    """The number of one of the tasks is the array's own."""
    script = Script(tmp_path, "--sweep", "seed=1,2")
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    assert script.run("n2\tslow\n", **array)[1][1:] == [
        "scontrol requeue 7_1",
        "scontrol update JobId=7_1 ExcNodeList=n2",
    ]
    assert read_left_out(script.out / "1") == [("7_1", "n2", "slow")]
    _, [line] = script.run("n2\tslow\n", **array)
    assert line.endswith(f"sbatch --array=1 --exclude=n2 {script.out}/slurm/job.sbatch")
    assert (script.out / "slurm" / "jobs.txt").read_text() == "7\n7\n"
