"""Which nodes are fit: judged on made-up measurements, and measured once by two processes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mhc_megatron.launch.cli import main
from mhc_megatron.launch.environment import node_name
from mhc_megatron.launch.gpus import Gpu
from mhc_megatron.launch.local import launch_local
from mhc_megatron.launch.preflight import Limits, Measurement, report

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
            product_seconds=2e-3,
            node_bandwidth=300.0,
            job_bandwidth=40.0,
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
        ({"product_seconds": 4e-3}, "GPU 1 multiplies 2.0 x slower than the others"),
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
            {"local_rank": 0, "clock_offset": -4.21},
            "its clock is 4.2 s behind rank 0's",
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
    lines = report(job(**changes), Limits(min_node_bandwidth=200))
    assert lines == [f"node n1: {reason} (leave it out with --exclude n1)"]


def test_reasons_of_one_node_share_its_line() -> None:
    gpu = dataclasses.replace(GPU, ecc_errors=1)
    [line] = report(job(product_seconds=1.0, gpu=gpu), Limits())
    assert line.count("; ") == 1 and line.startswith("node n1: GPU 1 multiplies 500.0 x slower")


def test_the_network_is_nobodys() -> None:
    assert report(job(), Limits(min_job_bandwidth=50)) == [
        "an all-reduce over 4 ranks reaches 40 GB/s, below --min-job-bandwidth 50; look at the "
        "network, or lower it"
    ]


def test_the_speed_of_a_cpu_and_the_links_of_a_lone_gpu_are_not_judged() -> None:
    cpu = job(product_seconds=1.0, gpu=None, gpu_used_bytes=None)
    assert report(cpu, Limits()) == []
    lone = job(gpu=dataclasses.replace(GPU, links_up=0), node_bandwidth=None)
    assert report(lone, Limits(min_node_bandwidth=200)) == []


def test_two_processes_measure_and_name_their_node(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["preflight", "--out", str(tmp_path / "new"), "--min-job-bandwidth", "1e9"]
    status = launch_local(
        "mhc_megatron.launch.cli", [*words, "--min-free-gb", "1e9"], num_processes=2
    )
    lines = capfd.readouterr().err.splitlines()
    ours = [line for line in lines if line.startswith("mhc-megatron preflight: ")]
    assert status == 1 and len(ours) == 2, lines
    node = node_name()
    assert ours[0].startswith(f"mhc-megatron preflight: node {node}: ")
    assert ours[0].endswith(f"below --min-free-gb 1e+09 (leave it out with --exclude {node})")
    assert "an all-reduce over 2 ranks reaches " in ours[1]
    assert not (tmp_path / "new").exists()


def test_a_fit_node_of_one_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preflight", "--out", str(tmp_path), "--min-free-gb", "0.001"]) == 0
    assert capsys.readouterr().out == "preflight: fit: 1 rank(s) on 1 node(s)\n"
