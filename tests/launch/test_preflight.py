"""Which nodes are fit: judged on made-up measurements, and measured once by two processes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mhc_megatron.errors import UserError
from mhc_megatron.launch.cli import main
from mhc_megatron.launch.environment import node_name
from mhc_megatron.launch.gpus import Gpu
from mhc_megatron.launch.judge_nodes import Limits, Measurement, not_judged, replaceable, report
from mhc_megatron.launch.local import launch_local
from mhc_megatron.launch.preflight import limit_flags

GPU = Gpu(name="H100", links_up=18, links=18, ecc_errors=0, throttling=("power cap",))


def job(**changes: Any) -> list[Measurement]:
    """Two nodes of two GPUs, of which rank 3, on node n1, is changed."""
    good = [
        Measurement(
            rank=rank,
            local_rank=rank % 2,
            host=f"n{rank // 2}",
            clock_offset=0.01,
            free_bytes=10**12,
            product_is_right=True,
            product_tflops=600.0,
            node_bandwidth=300.0,
            job_bandwidth=40.0,
            gpu_name="NVIDIA H100 80GB HBM3",
            gpu=GPU,
            gpu_used_bytes=10**9,
        )
        for rank in range(4)
    ]
    return [*good[:3], dataclasses.replace(good[3], **changes)]


def test_good_nodes_are_not_named() -> None:
    limits = Limits(min_node_bandwidth=200, min_job_bandwidth=20)
    assert report(job(), limits) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"product_is_right": False}, "GPU 1 multiplies wrongly"),
        ({"product_tflops": 250.0}, "GPU 1 multiplies 2.4 x slower than the others"),
        ({"gpu_used_bytes": 9 * 10**9}, "GPU 1 has 9.0 GB taken by something else"),
        (
            {"gpu": dataclasses.replace(GPU, ecc_errors=2)},
            "GPU 1 has 2 uncorrected ECC errors",
        ),
        (
            {"gpu": dataclasses.replace(GPU, throttling=("power cap", "hardware slowdown"))},
            "GPU 1 is held down by hardware slowdown",
        ),
        ({"gpu": dataclasses.replace(GPU, links_up=17)}, "GPU 1 has 17 of 18 NVLinks"),
        (
            {"product_tflops": 395.0},
            "GPU 1 multiplies with 395 TFLOP/s, below --min-matmul-tflops 395.6",
        ),
        ({"failure": "CUDA error: GPU is lost"}, "GPU 1 fails: CUDA error: GPU is lost"),
        (
            {"local_rank": 0, "clock_offset": -4.21},
            "its clock is 4.2 s behind the other nodes'",
        ),
        (
            {"local_rank": 0, "free_bytes": 10**9},
            "1.0 GB free for checkpoints, below --min-free-gb 5",
        ),
        (
            {"local_rank": 0, "node_bandwidth": 80.0},
            "an all-reduce inside it reaches 80 GB/s, below --min-node-bandwidth 200",
        ),
    ],
)
def test_a_bad_node_is_named_in_one_line(changes: dict[str, Any], reason: str) -> None:
    lines = report(job(**changes), Limits(min_node_bandwidth=200, max_slowdown=2))
    assert lines == [f"node n1: {reason} (leave it out with --exclude n1)"]


def test_reasons_of_one_node_share_its_line() -> None:
    gpu = dataclasses.replace(GPU, ecc_errors=1)
    [line] = report(job(product_tflops=1.2, gpu=gpu), Limits())
    assert line.count("; ") == 1 and line.startswith("node n1: GPU 1 multiplies 500.0 x slower")


def test_the_network_is_nobodys() -> None:
    assert report(job(), Limits(min_job_bandwidth=50)) == [
        "an all-reduce over 4 ranks reaches 40 GB/s, below --min-job-bandwidth 50; look at the "
        "network, or lower it"
    ]


def test_the_speed_of_a_cpu_and_the_links_of_a_lone_gpu_are_not_judged() -> None:
    cpu = job(product_tflops=1e-3, gpu_name=None, gpu=None, gpu_used_bytes=None)
    assert report(cpu, Limits()) == []
    lone = job(gpu=dataclasses.replace(GPU, links_up=0), node_bandwidth=None)
    assert report(lone, Limits(min_node_bandwidth=200)) == []


def test_of_two_clocks_rank_0s_is_taken_for_right() -> None:
    two = [job()[0], job(local_rank=0, clock_offset=2.0)[3]]
    [line] = report(two, Limits())
    assert line.startswith("node n1: its clock is 2.0 s ahead of rank 0's")


def test_a_gpu_that_is_known_has_floors_of_its_own() -> None:
    slow = job(local_rank=0, node_bandwidth=89.0)
    [line] = report(slow, Limits())
    assert "an all-reduce inside it reaches 89 GB/s, below --min-node-bandwidth 90" in line
    assert report(slow, Limits(min_node_bandwidth=0)) == []


@pytest.mark.parametrize(
    ("gpu_name", "limits", "said"),
    [
        ("NVIDIA H200", Limits(min_job_bandwidth=20), None),
        ("NVIDIA H200", Limits(), "no floor for the all-reduce of all ranks (--min-job-bandwidth)"),
        (
            "NVIDIA L4",
            Limits(min_job_bandwidth=20),
            "no floor for the matrix product of NVIDIA L4 (--min-matmul-tflops), the all-reduce in "
            "a node of NVIDIA L4 (--min-node-bandwidth)",
        ),
        (
            None,
            Limits(min_job_bandwidth=20),
            "no floor for the all-reduce in a node (--min-node-bandwidth)",
        ),
    ],
)
def test_what_has_no_floor_is_said(gpu_name: str | None, limits: Limits, said: str | None) -> None:
    found = [dataclasses.replace(one, gpu_name=gpu_name) for one in job()]
    assert not_judged(found, limits) == said


def test_other_nodes_replace_bad_ones_unless_all_are_bad_or_the_job_is() -> None:
    bad = job(failure="GPU is lost")
    assert replaceable(bad, Limits()) == {"n1": ["GPU 1 fails: GPU is lost"]}
    assert replaceable(bad[3:], Limits()) == {"n1": ["GPU 1 fails: GPU is lost"]}  # a job of one
    assert replaceable(bad, Limits(min_job_bandwidth=50)) == {}
    assert replaceable(job(), Limits(min_node_bandwidth=400)) == {}  # the limit is wrong
    full = [dataclasses.replace(one, free_bytes=10**9) for one in job()]
    assert replaceable(full, Limits()) == {}
    assert report(full, Limits()) == [
        "1.0 GB free for checkpoints on every node, below --min-free-gb 5; make room in the run "
        "directory, or lower it"
    ]


def test_limits_of_a_job_are_the_flags_of_the_command() -> None:
    given = ["min_job_bandwidth=20", "max-slowdown=1.2"]
    assert limit_flags(given) == ("--min-job-bandwidth", "20", "--max-slowdown", "1.2")
    for text, message in (
        ("min_bandwidth=20", "--limits 'min_bandwidth=20' is not NAME=VALUE of one of min-matmul-"),
        ("min_free_gb=", "--limits 'min_free_gb=': a number of 0 or more is needed"),
        ("min_free_gb=-1", "--limits 'min_free_gb=-1': a number of 0 or more is needed"),
        ("min_free_gb=nan", "--limits 'min_free_gb=nan': a number of 0 or more is needed"),
    ):
        with pytest.raises(UserError) as refused:
            limit_flags([text])
        assert str(refused.value).startswith(message)


def preflight_lines(err: str) -> list[str]:
    words = "mhc-megatron preflight: "
    return [line.removeprefix(words) for line in err.splitlines() if line.startswith(words)]


def test_two_processes_measure_and_judge(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["preflight", "--out", str(tmp_path / "new"), "--min-job-bandwidth", "1e9"]
    words += ["--min-node-bandwidth", "1e9", "--min-free-gb", "1e9"]
    unfit = tmp_path / "unfit"
    status = launch_local(
        "mhc_megatron.launch.cli", [*words, "--unfit", str(unfit)], num_processes=2
    )
    lines = preflight_lines(capfd.readouterr().err)
    assert status == 1 and len(lines) == 3, lines
    assert lines[0].startswith(f"node {node_name()}: an all-reduce inside it reaches ")
    assert lines[0].endswith(f" (leave it out with --exclude {node_name()})")
    assert lines[1].startswith("an all-reduce over 2 ranks reaches ")
    assert "GB free for checkpoints on every node, below --min-free-gb 1e+09; " in lines[2]
    assert unfit.read_text() == "" and not (tmp_path / "new").exists()


def test_a_rank_that_cannot_measure_is_named_and_nobody_waits_for_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    unfit = tmp_path / "unfit"
    words = ["RANK=1", "preflight", "--out", str(tmp_path), "--unfit", str(unfit)]
    words += ["--min-free-gb", "0.001"]
    assert launch_local("helpers.lost_gpu", words, num_processes=2) == 1
    node, reason = node_name(), "rank 1 fails: CUDA error: GPU is lost"
    assert preflight_lines(capfd.readouterr().err) == [
        f"node {node}: {reason} (leave it out with --exclude {node})"
    ]
    assert unfit.read_text() == f"{node}\t{reason}\n"


def test_a_fit_node_of_one_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preflight", "--out", str(tmp_path), "--min-free-gb", "0.001"]) == 0
    assert capsys.readouterr().out == "preflight: fit: 1 rank(s) on 1 node(s)\n"
