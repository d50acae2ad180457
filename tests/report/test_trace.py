"""Recorded steps: exposed times in closed form, sets of time against a grid, bad input."""

import argparse
import gzip
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mhc_megatron.errors import UserError
from mhc_megatron.pipeline.intervals import intersection, length, union
from mhc_megatron.report import trace_cli
from mhc_megatron.report.gpu_kinds import Kind, kind_of, mhc_kernel_names
from mhc_megatron.report.gpu_trace import read_trace

INTERVALS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=12)


def gpu(name: str, start: float, dur: float, stream: int, number: int) -> dict[str, object]:
    args = {"device": 0, "stream": stream, "correlation": number}
    return {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": dur, "args": args}


def launch(start: float, number: int) -> dict[str, object]:
    args = {"correlation": number}
    return {"ph": "X", "cat": "cuda_runtime", "name": "l", "ts": start, "dur": 1, "args": args}


def named(name: str, start: float, dur: float) -> dict[str, object]:
    return {"ph": "X", "cat": "user_annotation", "name": name, "ts": start, "dur": dur}


# Compute 100-200, mHC 180-240, communication 190-300 and 350-400: the GPU idles 300-350.
EVENTS = [
    gpu("sm90_gemm", 100, 100, 7, 1),
    gpu("mix_fwd", 180, 60, 7, 2),
    gpu("ncclDevKernel_SendRecv", 190, 110, 20, 3),
    gpu("ncclDevKernel_SendRecv", 350, 50, 20, 4),
    *(launch(10 * number, number) for number in (1, 2, 3, 4)),
    named("0F3", 5, 20),
    named("0F3", 35, 10),
    named("0F4", 60, 5),
]

GOLDEN = """\
stream  mostly          kernels       busy us   share
     7  other compute         2       140.000   46.7%
    20  communication         2       160.000   53.3%

kind                       total us     hidden us    exposed us
communication               160.000        50.000       110.000
mHC                          60.000        60.000         0.000
other compute               100.000         0.000       100.000
memcpy/memset                 0.000         0.000         0.000
mHC behind compute                         20.000
mHC behind comm.                           50.000
idle                         50.000
window                      300.000

"""


def write(folder: Path, events: object = EVENTS) -> Path:
    path = folder / "rank_0000.json"
    path.write_text(json.dumps({"traceEvents": events}))
    return path


def run(path: Path, **values: str) -> None:
    args = argparse.Namespace(
        **{"file": str(path), "range": None, "json": None, "svg": None, **values}
    )
    assert trace_cli.run(args) == 0


@given(INTERVALS, INTERVALS)
def test_sets_of_time_against_a_grid(left: list[tuple[int, int]], right: list[tuple[int, int]]):
    a, b = ({t for s, e in side for t in range(s, e)} for side in (left, right))
    assert {t for s, e in union(left) for t in range(s, e)} == a
    assert length(union(left)) == len(a)
    assert length(intersection(union(left), union(right))) == len(a & b)


def test_kinds_by_name() -> None:
    assert {"mix_fwd", "post_fwd", "streams_bwd"} <= mhc_kernel_names()
    assert "tanh" not in mhc_kernel_names()
    assert kind_of("kernel", "void deep_ep::intranode::dispatch<8>") is Kind.COMMUNICATION
    assert kind_of("gpu_memset", "Memset (Device)") is Kind.MEMORY


def test_the_table_of_a_whole_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(write(tmp_path))
    assert capsys.readouterr().out == GOLDEN


def test_a_range_is_what_it_launched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers.json"
    run(write(tmp_path), range="0F3", json=str(out))
    first, second = json.loads(out.read_text())
    # The first launched compute and mHC, which the communication of others hides from 190 on.
    assert first["window"] == 140_000
    assert first["kinds"]["communication"]["total"] == 0
    assert first["mhc_behind_communication"] == 50_000
    assert second["window"] == second["kinds"]["communication"]["exposed"] == 50_000
    assert "sum of 2" in capsys.readouterr().out


def test_the_picture_has_a_row_per_stream(tmp_path: Path) -> None:
    out = tmp_path / "step.svg"
    run(write(tmp_path), svg=str(out))
    rows = ET.parse(out).getroot().findall("{http://www.w3.org/2000/svg}g")
    assert ["".join(row.itertext()).split()[0] for row in rows] == ["7", "20"]
    # Per row: the ground, then a box per kernel, none of which are neighbours of one kind.
    boxes = [row.findall("{http://www.w3.org/2000/svg}rect") for row in rows]
    assert [len(row) for row in boxes] == [3, 3]
    assert float(boxes[0][2].get("width", "0")) == 400.0  # 100 of 300 us on 1200 pixels
    with pytest.raises(UserError, match=r"--svg .*name a writable file"):
        run(write(tmp_path), svg=str(tmp_path))


def test_work_on_many_streams_has_a_row_per_kind(tmp_path: Path) -> None:
    """A CUDA graph's is on streams that the driver chooses."""
    names = ("sm90_gemm", "mix_fwd", "ncclDevKernel_SendRecv")
    events = [gpu(names[i % 3], 100 + 20 * i, 10, 100 + i, i) for i in range(15)]
    out = tmp_path / "graph.svg"
    run(write(tmp_path, events), svg=str(out))
    rows = ET.parse(out).getroot().findall("{http://www.w3.org/2000/svg}g")
    names_of_rows = ["".join(row.itertext()).strip() for row in rows]
    assert names_of_rows == ["communication", "mHC", "other compute"]
    assert [len(row.findall("{http://www.w3.org/2000/svg}rect")) for row in rows] == [6, 6, 6]


def test_gzip_reads_the_same(tmp_path: Path) -> None:
    path = write(tmp_path)
    packed = tmp_path / "rank.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_trace(packed) == read_trace(path)
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(UserError, match="truncated or damaged gzip"):
        read_trace(packed)


def test_a_copy_between_gpus_belongs_to_the_one_that_runs_it(tmp_path: Path) -> None:
    args = {"fromDevice": 0, "inDevice": 0, "toDevice": 1, "stream": 9, "correlation": 5}
    copy = {**gpu("Memcpy PtoP (Device -> Device)", 310, 20, 9, 5), "cat": "gpu_memcpy"}
    (found,) = set(read_trace(write(tmp_path, [{**copy, "args": args}])).work)
    assert (found.kind, found.end - found.start) == (Kind.MEMORY, 20_000)
    with pytest.raises(UserError, match=r"work of GPUs \[0, 1\]; record one process"):
        read_trace(write(tmp_path, [*EVENTS, {**copy, "args": {**args, "inDevice": 1}}]))


def test_bad_input_names_the_remedy(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(UserError, match=r"--range 0F5: no such range.*0F3"):
        run(path, range="0F5")
    with pytest.raises(UserError, match="launched no GPU work"):
        run(path, range="0F4")
    path.write_text("[]")
    with pytest.raises(UserError, match="traceEvents is missing"):
        read_trace(path)
    path.write_text('{"traceEvents": [')
    with pytest.raises(UserError, match="not JSON"):
        read_trace(path)


def test_a_trace_of_the_cpu_alone_says_so(tmp_path: Path) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(3).sum()
    path = tmp_path / "cpu.json"
    profile.export_chrome_trace(str(path))
    with pytest.raises(UserError, match="no GPU events"):
        read_trace(path)
