"""Jobs for SLURM: where ranks go, the script to the letter, and what is refused before sbatch."""

import shlex
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import pytest

from mhc_megatron.errors import UserError
from mhc_megatron.launch.cli import main
from mhc_megatron.launch.slurm import cluster, submit
from mhc_megatron.launch.slurm.job import Job, Site
from mhc_megatron.launch.slurm.mounts import code_folders, container_mounts
from mhc_megatron.launch.slurm.placement import grid, place
from mhc_megatron.launch.slurm.script import render_sbatch
from mhc_megatron.launch.slurm.variables import variables
from mhc_megatron.training.heartbeat import Heartbeat, prepare_heartbeats
from mhc_megatron.training.layout import ParallelConfig

GOLDEN = Path(__file__).parent / "golden"
HOSTILE = "$(touch /tmp/never) `id` \"two words\" 'x' \\ ; rm"


def job_of(*words: str) -> Job:
    parser = ArgumentParser()
    submit.add_arguments(parser)
    return submit.make_job(
        parser.parse_args(["--recipe", "gpt-100m", "--python", "/opt/python", *words])
    )


def test_tensor_parallel_groups_share_a_node_and_stages_are_apart() -> None:
    layout = ParallelConfig(tensor=4, pipeline=2, data=2)
    placement = place(layout, ranks_per_node=8)
    assert (placement.num_nodes, placement.ranks_per_node) == (2, 8)
    for stage, node in enumerate(placement.nodes):
        assert {place.pipeline for place in node} == {stage}
        assert [place.tensor for place in node] == [0, 1, 2, 3] * 2
    assert grid(placement).splitlines() == [
        "rank, t tensor, d data, p pipeline",
        "node 0 | 0 t0 d0 p0  | 1 t1 d0 p0  | 2 t2 d0 p0  | 3 t3 d0 p0  | "
        "4 t0 d1 p0  | 5 t1 d1 p0  | 6 t2 d1 p0  | 7 t3 d1 p0 ",
        "node 1 | 8 t0 d0 p1  | 9 t1 d0 p1  | 10 t2 d0 p1 | 11 t3 d0 p1 | "
        "12 t0 d1 p1 | 13 t1 d1 p1 | 14 t2 d1 p1 | 15 t3 d1 p1",
    ]


def test_copies_of_a_stage_are_replicas() -> None:
    """As Megatron sees bidirectional DualPipe: half of the pipeline, twice the data parallelism."""
    [node] = place(ParallelConfig(pipeline=4, schedule="dualpipe"), ranks_per_node=8).nodes
    assert [(place.pipeline, place.data) for place in node] == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("layout", "ranks_per_node", "message"),
    [
        (
            ParallelConfig(pipeline=12),
            8,
            "parallel.pipeline=12 = 12 ranks do not fill nodes of 8; change the layout to a "
            "multiple of 8, or --ranks-per-node",
        ),
        (
            ParallelConfig(tensor=8, pipeline=2),
            4,
            "parallel.tensor=8 does not divide the 4 ranks of a node, so that tensor-parallel "
            "groups would cross nodes; change it, or pass --allow tensor-across-nodes",
        ),
        (ParallelConfig(), 0, "--ranks-per-node=0 must be at least 1"),
    ],
)
def test_layouts_that_no_nodes_fit(
    layout: ParallelConfig, ranks_per_node: int, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        place(layout, ranks_per_node=ranks_per_node)
    assert str(caught.value) == message


def test_a_group_may_cross_nodes_if_it_is_allowed() -> None:
    layout = ParallelConfig(tensor=8, pipeline=2)
    assert place(layout, ranks_per_node=4, tensor_across_nodes=True).num_nodes == 4


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "two_nodes",
            "--set parallel.tensor=2 parallel.data=8 global_batch_size=64 --out /runs/big "
            "--partition h100 --account lab --qos high --time 1-12:00:00 --cores 12 "
            "--exclude n[3-4] n7 --modules cuda/12.9 --container site#lab/mhc:1.2 "
            "--mounts /data:/data --env NCCL_DEBUG=INFO",
        ),
        ("sweep_on_cpus", "--sweep seed=1,2 --out /runs/sweep --cpu --no-requeue --no-preflight"),
    ],
)
def test_the_script_to_the_letter(name: str, words: str) -> None:
    script = render_sbatch(job_of(*words.split()))
    assert script == (GOLDEN / f"{name}.sbatch").read_text()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_values_reach_the_command_as_they_are(tmp_path: Path) -> None:
    """The shell of the script runs nothing that it is given."""
    job = job_of(
        "--set", f"data.tokenizer={HOSTILE}", "--env", f"SECRET={HOSTILE}", "--out", str(tmp_path),
        "--no-preflight",
    )  # fmt: skip
    shown = tmp_path / "shown.py"
    shown.write_text("import json, os, sys\nprint(json.dumps([sys.argv, os.environ['SECRET']]))\n")
    script = render_sbatch(job).replace("/opt/python -m", f"{sys.executable} {shown} -m")
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, body in (("srun", 'shift; exec "$@"'), ("scontrol", "echo NodeAddr=here")):
        (stubs / name).write_text(f"#!/bin/sh\n{body}\n")
        (stubs / name).chmod(0o755)
    environment = {
        "PATH": f"{stubs}:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
    }
    done = subprocess.run(
        ["bash"], input=script, text=True, capture_output=True, env=environment, check=True
    )
    assert HOSTILE in done.stdout.replace('\\"', '"').replace("\\\\", "\\")
    assert f"data.tokenizer={HOSTILE}" in done.stdout.replace('\\"', '"').replace("\\\\", "\\")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name", "two words"], "--name='two words': only letters"),
        (["--partition", "$(id)"], "--partition='$(id)': only letters"),
        (["--account", "--wrap=id"], "--account='--wrap=id': only letters"),
        (["--modules", "a;b"], "--modules='a;b': only letters"),
        (["--out", "/runs/a b"], "--out='/runs/a b': only letters"),
        (["--container", "$(id)"], "--container='$(id)' is no image of pyxis; name [USER@][REG"),
        (["--container", "a b"], "--container='a b' is no image of pyxis"),
        (["--container", "'a'"], "is no image of pyxis"),
        (["--container", "a#b#c"], "--container='a#b#c' is no image of pyxis"),
        (["--container", "images/mhc.sqsh"], "or the absolute path of a .sqsh file"),
        (["--container", "/images/m hc.sqsh"], "--container='/images/m hc.sqsh': only letters"),
        (["--mounts", "/data:/data"], "--mounts=/data:/data needs --container"),
        (["--time", "tomorrow"], "--time='tomorrow' is not SLURM's"),
        (["--cores", "0"], "--cores=0 must be at least 1"),
        (["--env", "A B=1"], "--env 'A B' is not the name of a variable"),
        (["--env", "A"], "--env 'A' is not NAME=VALUE"),
        (["--env", "MASTER_ADDR=x"], "--env MASTER_ADDR: the job sets it, from its first node"),
        (["--env", "A=1\n#SBATCH --uid=0"], "--env A: a value of one line is needed"),
        (["--sweep", "seed"], "--sweep 'seed' is not KEY=A,B"),
        (["--sweep", "parallel.data=1,2"], "--sweep parallel.data=2 changes the layout"),
        (["--sweep", "seeds=1,2"], "seeds"),
        (["--set", "parallel.tensor=3"], "parallel.tensor=3"),
    ],
)
def test_bad_jobs_are_refused(words: list[str], message: str) -> None:
    # Joined: argparse would take --wrap=id for an option of its own.
    joined = [words[0] + "=" + words[1]] if words[1].startswith("-") else words
    with pytest.raises(UserError) as caught:
        job_of(*joined)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "image",
    [
        "ubuntu",
        "nvcr.io#nvidia/pytorch:25.06-py3",
        "user@registry.site:5005#group/image:v1.0_a",
        "docker://nvcr.io#nvidia/pytorch:25.06-py3",
        "lab/mhc@sha256:0123456789abcdef",
        "/images/mhc+cuda=12.9.sqsh",
    ],
)
def test_images_of_pyxis_reach_srun_as_they_are(image: str) -> None:
    script = render_sbatch(job_of("--container", image, "--out", "/runs/x"))
    [command] = [line for line in script.splitlines() if line.endswith('"${command[@]}"')]
    assert f"--container-image={image}" in shlex.split(command)


def test_a_container_sees_the_run_its_data_and_the_code() -> None:
    """Of this Python where none is named, which is then the image's."""
    words = "--out /runs/x --container lab/mhc --set data.train=/data/a/train data.valid=/data/v"
    assert job_of(*words.split()).site.mounts == ("/data:/data", "/runs/x:/runs/x")
    data = "data.train=/data/a/train,/more/b/train data.valid=/data/a/valid"
    sweep = job_of(*f"--out /runs/x --container lab/mhc --sweep {data}".split())
    assert sweep.site.mounts == ("/data/a:/data/a", "/more/b:/more/b", "/runs/x:/runs/x")
    # The embedded corpus is beside a run, and beside an array's runs in their folder.
    assert job_of("--out", "/runs/x", "--container", "lab/mhc").site.mounts == ("/runs:/runs",)
    seeds = job_of("--out", "/runs/x", "--container", "lab/mhc", "--sweep", "seed=1,2")
    assert seeds.site.mounts == ("/runs/x:/runs/x",)
    with pytest.raises(UserError, match=r"data\.train='c/train' must be absolute with --container"):
        job_of("--container", "lab/mhc", "--set", "data.train=c/train", "data.valid=/c/valid")
    with pytest.raises(UserError, match="'/' cannot be mounted into a container"):
        job_of("--container", "lab/mhc", "--out", "/run")

    code = code_folders("helpers.recipes:small")
    assert str(Path(__file__).parents[1]) in code and sys.prefix in code
    assert str(Path(__file__).parents[2]) in code
    parser = ArgumentParser()
    submit.add_arguments(parser)
    job = submit.make_job(parser.parse_args(["--recipe", "gpt-100m", "--container", "lab/mhc"]))
    sources = [mount.split(":")[0] for mount in job.site.mounts]
    assert any(sys.prefix == source or sys.prefix.startswith(f"{source}/") for source in sources)


def test_what_is_mounted_by_hand_comes_first_and_once() -> None:
    given = ["/fast/runs:/runs", "/etc/a:/etc/a:ro"]
    assert container_mounts(given, ["/runs", "/code/venv", "/code", "/codes"]) == (
        *given, "/code:/code", "/codes:/codes",
    )  # fmt: skip
    with pytest.raises(UserError, match="'/a,b' cannot be mounted into a container"):
        container_mounts([], ["/a,b"])


def test_a_percent_sign_of_a_folder_is_no_pattern_of_slurm() -> None:
    script = render_sbatch(job_of("--out", "/runs/50%j", "--name", "half"))
    assert "#SBATCH --output=/runs/50%%j/slurm/%j.log\n" in script
    assert "out=/runs/50%j\n" in script


class Slurm:
    """Answers of a cluster's commands."""

    def __init__(self, *, enforce: str = "none", default: str = "*") -> None:
        self.enforce, self.default = enforce, default
        self.scripts: list[str] = []

    def __call__(self, command: Sequence[str], text: str | None) -> str:
        if command[0] == "sinfo":
            return f"debug{self.default}|2\nh100|16\nh100|4\n"
        if command[0] == "scontrol":
            return f"AccountingStorageEnforce = {self.enforce}\n"
        if command[0] == "squeue":
            return (
                "42|42|RUNNING|1:02|n1\n43|43|PENDING|0:00|(Priority)\n"
                "50|50_[2]|PENDING|0:00|(Resources)\n50|50_1|RUNNING|0:07|n2\n"
            )
        assert text is not None
        self.scripts.append(text)
        return "42;cluster\n"


def test_lists_that_are_given_twice_add_up() -> None:
    job = job_of("--exclude", "n1", "--modules", "a", "--exclude", "n2", "--modules", "b")
    text = render_sbatch(job)
    assert "--exclude=n1,n2" in text and "module load a\nmodule load b\n" in text


@pytest.mark.parametrize(
    ("slurm", "words", "message"),
    [
        (
            Slurm(),
            ["--partition", "a100"],
            "--partition='a100' does not exist on this cluster; it has debug, h100",
        ),
        (Slurm(default=""), [], "the cluster has no default partition; pass --partition, one of"),
        (
            Slurm(),
            ["--set", "parallel.data=32", "global_batch_size=256"],
            "the layout needs 4 nodes, and partition 'debug' has 2",
        ),
        (Slurm(enforce="associations,limits"), [], "pass --account"),
    ],
)
def test_the_cluster_is_asked_first(slurm: Slurm, words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        cluster.check(job_of(*words), slurm)
    assert message in str(caught.value)


def test_jobs_that_fit_pass() -> None:
    wide = ["--set", "parallel.data=128", "global_batch_size=1024", "--partition", "h100"]
    cluster.check(job_of(*wide), Slurm())
    cluster.check(job_of("--account", "lab"), Slurm(enforce="associations"))


def test_submission_and_the_queue() -> None:
    slurm = Slurm()
    assert cluster.submit("#!/bin/bash\n", slurm) == "42"
    assert slurm.scripts == ["#!/bin/bash\n"]
    assert cluster.queued(["42"], slurm) == [("42", "42", "RUNNING", "1:02", "n1")]
    # Of an array, what waits and what runs: their own numbers are others than that of sbatch.
    array = [(row.task, row.state) for row in cluster.queued(["50"], slurm)]
    assert array == [("50_[2]", "PENDING"), ("50_1", "RUNNING")]


def test_without_slurm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["submit", "--recipe", "gpt-100m"]) == 2
    assert "sinfo is not on this machine's PATH" in capsys.readouterr().err
    assert main(["submit", "--recipe", "gpt-100m", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory; choose another"):
        submit._make_folder(tmp_path / "file" / "run")


def test_folders_that_were_never_submitted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "has no jobs.txt of mhc-megatron submit" in capsys.readouterr().err
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs.txt").write_text("7\n")
    assert main(["logs", str(tmp_path)]) == 2
    assert "job 7 has no log yet" in capsys.readouterr().err
    (tmp_path / "slurm" / "7.log").write_text("step 1\n")
    (tmp_path / "slurm" / "70.log").write_text("of another run\n")
    assert main(["logs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "step 1\n"


def test_the_runs_of_an_array_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs.txt").write_text("50\n")
    for task in ("2", "10"):
        out = tmp_path / task
        prepare_heartbeats(out)
        Heartbeat(out, rank=0).begin("reads data", step=1)
        (tmp_path / "slurm" / f"50_{task}.log").write_text(f"task {task}\n")
    (tmp_path / "10" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "step_ms": 5.0}\n')
    rows = [cluster.Queued("50", "50_2", "RUNNING", "0:10", "n1")]
    rows += [cluster.Queued("50", "50_[11]", "PENDING", "0:00", "(Resources)")]
    monkeypatch.setattr(cluster, "queued", lambda jobs: rows)
    assert main(["status", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        f"job 50_2 ({tmp_path}/2): running, 0:10, n1",
        "job 50_[11]: pending, 0:00, (Resources)",
        f"{tmp_path}/2: no step yet",
    ]
    assert lines[3].startswith("rank  node  step  doing") and lines[4].startswith("0 ")
    assert lines[5] == f"{tmp_path}/10: step 1, loss 2.0000, 5 ms"
    assert lines[6].startswith("rank  node") and len(lines) == 8
    assert main(["logs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "==> 50_10.log <==\ntask 10\n==> 50_2.log <==\ntask 2\n"


def test_every_variable_has_a_reason() -> None:
    overlapped = ParallelConfig(pipeline=2, tensor=2, schedule="dualpipe_v", overlap="all")
    for layout, expected in (
        (ParallelConfig(), "8"),
        (ParallelConfig(tensor=2), "1"),
        (overlapped, "32"),
    ):
        found = variables(layout, on_gpu=True, cores=None)
        assert all(variable.reason for variable in found)
        connections = {v.name: v.value for v in found}["CUDA_DEVICE_MAX_CONNECTIONS"]
        assert connections == expected
    assert Site().gpus
