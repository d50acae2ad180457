"""Figures in the documentation are those of the result files."""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "benchmarks/results").rglob("*.jsonl"))
PROVENANCE = ("run", "gpu", "torch", "commit", "date", "benchmark", "impl", "shape", "metric")


RESULTS = ROOT / "benchmarks" / "results"
KERNELS = RESULTS / "h100" / "kernels.jsonl"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A module of benchmarks/, which is no package."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_the_performance_page_shows_the_results_file(benchmark: Callable[[str], Any]) -> None:
    tables = benchmark("kernel_table")
    lines = tables.read(KERNELS)
    page = (ROOT / "docs" / "performance.md").read_text()
    assert tables.latest(lines) in page
    assert tables.history(lines) in page
    newer = tables.read(RESULTS / "h200" / "kernels.jsonl")
    for table in (tables.latest, tables.ends, tables.host):
        assert table(newer) in page


def test_the_recompute_page_shows_the_results_files(benchmark: Callable[[str], Any]) -> None:
    tables, read = benchmark("recompute_table"), benchmark("kernel_table").read
    memory = read(KERNELS.with_name("recompute_memory.jsonl"))
    page = (ROOT / "docs" / "recompute.md").read_text()
    assert tables.memory(memory) in page
    for gpu in ("h100", "h200"):
        assert tables.time(read(RESULTS / gpu / "recompute_time.jsonl")) in page
    assert (ROOT / "docs" / "recompute_memory.svg").read_text() == tables.draw(memory)


def test_the_fp8_page_shows_the_results_files(benchmark: Callable[[str], Any]) -> None:
    tables, read = benchmark("stage_tables"), benchmark("kernel_table").read
    page = (ROOT / "docs" / "fp8.md").read_text()
    for gpu in ("h100", "h200"):
        assert tables.blocks(read(RESULTS / gpu / "te_blocks.jsonl")) in page
    assert tables.block_graphs(read(RESULTS / "h200" / "te_blocks.jsonl")) in page
    assert tables.training(read(RESULTS / "h200" / "fp8_training.jsonl")) in page
    assert tables.messages(read(RESULTS / "cpu" / "message_training.jsonl")) in page


def test_the_picture_of_fp8_shows_the_results_file(benchmark: Callable[[str], Any]) -> None:
    plot, lines = (
        benchmark("fp8_plot"),
        benchmark("kernel_table").read(RESULTS / "h200" / "fp8_training.jsonl"),
    )
    shown = plot.curves(lines)
    assert len(shown) == 8
    picture = (ROOT / "docs" / "fp8_training.svg").read_text()
    for axes in plot.draw(lines).axes:
        for line in axes.lines:
            assert str(line.get_label()) in picture or line.get_label().startswith("_")
    # The run at the smaller rate, and lines without a seed are of one run too.
    assert shown["mHC", "bf16"][-1] > 1.55
    with pytest.raises(ValueError, match="no run has all of bf16, delayed"):
        plot.curves(lines[:3])


def test_the_pipeline_page_shows_the_results_file(benchmark: Callable[[str], Any]) -> None:
    tables, read = benchmark("stage_tables"), benchmark("kernel_table").read
    page = (ROOT / "docs" / "pipeline.md").read_text()
    lines = read(RESULTS / "h200" / "multigpu.jsonl")
    for table in (tables.multigpu, tables.multigpu_experts, tables.p2p, tables.parity):
        assert table(lines) in page
    picture = (ROOT / "docs" / "multigpu.svg").read_text()
    panels = benchmark("multigpu_plot").draw(lines).axes
    drawn = [text.get_text() for axes in panels for text in axes.texts]
    assert any(drawn)
    for text in drawn:
        assert text in picture
    for launch in ("eager", "graph"):
        assert tables.overlap(read(RESULTS / "h200" / "overlap.jsonl"), launch) in page
    assert tables.slowdowns(read(RESULTS / "h200" / "overlap.jsonl"), "graph") in page


def test_steps_as_graphs_are_in_the_performance_page(benchmark: Callable[[str], Any]) -> None:
    lines = benchmark("kernel_table").read(RESULTS / "h200" / "step_graph.jsonl")
    page = (ROOT / "docs" / "performance.md").read_text()
    for channels in (1280, 2560):
        assert benchmark("stage_tables").step_graph(lines, channels) in page


def test_pipelines_on_a_gpu_have_the_bits_of_a_loop_and_the_comparison_sees() -> None:
    """200 seeds per line, and without order between streams a fault is found."""
    newest: dict[tuple[str, int, str], dict[str, Any]] = {}
    for text in (RESULTS / "h200" / "pipeline.jsonl").read_text().splitlines():
        line = json.loads(text)
        shape = line["shape"]
        newest[line["impl"], shape["ranks"], shape["overlap"]] = line
    names = [f"mhc_megatron.{name}" for name in ("zb_h1", "dualpipe_v", "dualpipe")]
    expected = {(name, ranks, "none") for name in names for ranks in (4, 8)}
    overlaps = {("mhc_megatron.dualpipe_v", 4, overlap) for overlap in ("recompute", "all")}
    assert newest.keys() == expected | overlaps
    for line in newest.values():
        assert (line["seeds"], line["mismatches"]) == (200, 0)
        assert line["control"]["mismatches"] > line["control"]["seeds"] // 2


def test_layouts_over_several_gpus_are_within_their_bounds_and_a_fault_is_not() -> None:
    lines = map(json.loads, (RESULTS / "h200/multigpu.jsonl").read_text().splitlines())
    newest = {line["impl"]: line for line in lines if line["metric"] == "parity"}
    names = {name.removeprefix("mhc_megatron.") for name in newest}
    assert names >= {"tp2_sp", "dp2", "ep2", "pp2_1f1b", "pp2_dualpipe_v", "pp2_dualpipe_v_overlap"}
    for name, line in newest.items():
        assert (line["mismatches"] > 0) is name.endswith("_spoiled"), name
        if "pp2" in name:
            assert line["bound"] == "exact"


def test_megatrons_loop_has_the_losses_of_ours_on_a_gpu() -> None:
    lines = map(json.loads, (RESULTS / "h200/pretrain_parity.jsonl").read_text().splitlines())
    differences = {line["metric"]: line["value"] for line in lines}
    assert differences["loss_difference"] < 1e-6  # float32's rounding is 6e-8
    assert differences["grad_norm_difference"] < 1e-6


def test_gradients_do_not_change_with_the_policy_under_memory_pressure() -> None:
    lines = map(json.loads, (RESULTS / "h200/recompute_memory.jsonl").read_text().splitlines())
    stress = [line for line in lines if line["metric"] == "steps_with_another_bit"]
    assert stress
    for line in stress:
        assert (line["value"], line["steps"]) == (0, 500)
        assert line.get("alloc_retries", 1) > 0
    # Experts' counts make the host wait, which hides what is freed too early: dense layers show it.
    controls = {line["shape"]["model"]: line["control"] for line in stress if "control" in line}
    assert controls.keys() == {"dense", "experts"}
    assert controls["dense"]["mismatches"] > 0


def test_the_table_of_overlap(benchmark: Callable[[str], Any]) -> None:
    def line(impl: str, metric: str, *, run: str = "b", **values: Any) -> dict[str, Any]:
        common = {"impl": f"mhc_megatron.{impl}", "metric": metric, "run": run, "launch": "eager"}
        return {**common, **values}

    hidden = [f"hidden_{what}" for what in ("mhc", "exchanges")]
    lines = [
        line("none", "pair", run="a", value=99.0),
        line("none", "pair", value=100.0),
        *(line("none", metric, value=0.0, total=2.5) for metric in hidden),
        line("all", "pair", value=80.4, predicted=78.0),
        *(line("all", metric, value=71.6, total=2.5) for metric in hidden),
        line("none", "pair", value=50.0, launch="graph"),
    ]
    assert benchmark("stage_tables").overlap(lines).splitlines()[2:] == [
        "| none | 100 |  |  | 0 % of 2.5 ms | 0 % of 2.5 ms |",
        "| all | 80 | 78 | 1.03 | 72 % of 2.5 ms | 72 % of 2.5 ms |",
    ]
    factors = {"compute": {"priority": 1.04}, "priority": {"compute": 1.5}}
    lines[4] |= {"predicted_alone": 75.0, "slowdowns": factors}
    assert benchmark("stage_tables").overlap(lines).splitlines() == [
        "| overlap | pair, ms | alone, ms | predicted, ms | ratio | hidden of mHC | "
        "hidden of exchanges |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| none | 100 |  |  |  | 0 % of 2.5 ms | 0 % of 2.5 ms |",
        "| all | 80 | 75 | 78 | 1.03 | 72 % of 2.5 ms | 72 % of 2.5 ms |",
    ]
    assert benchmark("stage_tables").slowdowns(lines).splitlines() == [
        "| lane | beside compute | beside priority |",
        "| --- | --- | --- |",
        "| compute |  | 1.04 |",
        "| priority | 1.50 |  |",
    ]


def test_the_roofline_shows_the_results_file(benchmark: Callable[[str], Any]) -> None:
    tables = benchmark("kernel_table")
    lines = tables.read(KERNELS)
    points = benchmark("roofline").points(lines)
    image = (ROOT / "docs" / "roofline.svg").read_text()
    for name, found in points.items():
        assert name in image
        for point, line in zip(
            found,
            [
                line
                for line in tables.newest(lines)
                if (line["impl"], line["launch"], line["metric"]) == (name, "graph", "fwd_bwd")
            ],
            strict=True,
        ):
            # Time over the limit's time is the ratio that the file states.
            limit = point.megabytes / line["copy_tb_per_s"]
            assert point.microseconds / limit == pytest.approx(line["ratio_to_floor"], rel=1e-2)


def test_expand_and_contractions_have_a_table_of_their_own(benchmark: Callable[[str], Any]) -> None:
    tables, roofline = benchmark("kernel_table"), benchmark("roofline")
    lines = tables.read(KERNELS)
    more = [
        {**lines[-1], "commit": "later", "launch": "graph", "metric": "fwd", "impl": name}
        for name in ("mhc_megatron.expand", "reference.contract_learned")
    ]
    assert tables.latest(lines + more) == tables.latest(lines)
    assert roofline.points(lines + more) == roofline.points(lines)
    assert [row.split(" | ")[1] for row in tables.ends(more).splitlines()[2:]] == [
        line["impl"] for line in more
    ]


@pytest.mark.parametrize("operation", ["expand", "contract_mean", "contract_learned"])
def test_the_benchmark_checks_the_ends_of_a_model(
    operation: str, benchmark: Callable[[str], Any]
) -> None:
    implementations, measured = benchmark("implementations"), benchmark("contenders")
    data = implementations.random_operands(5, 2, 16, torch.bfloat16, 1, device="cpu")
    for name in (operation, f"reference.{operation}"):
        built = measured.builds_with(None)[name](data)
        errors, same = measured.check(data, built)
        assert same and errors.keys() == {"out", *(f"d_{leaf}" for leaf in built.leaves)}
        assert all(error < 1e-2 for error in errors.values()), errors
    floor = benchmark("ends").floor_bytes(10, 16, 2, 2, operation=operation)
    states = {"contract_learned": (3, 5)}.get(operation, (3, 3))
    phi = 4 * 2 * 2 * 16 if operation == "contract_learned" else 0
    assert floor[:2] == [320 * states[0] + phi, 320 * states[1] + 2 * phi]
    assert floor[2] == sum(floor[:2])


def test_several_pairs_in_one_backward_are_several_pairs(benchmark: Callable[[str], Any]) -> None:
    implementations, measured = benchmark("implementations"), benchmark("contenders")
    pairs = []
    for seed in (1, 2):
        data = implementations.random_operands(5, 2, 16, torch.bfloat16, seed, device="cpu")
        pairs.append(measured.builds_with(None)["reference"](data))
    separate = [grad for one in pairs for grad in one.backward(one.forward())]
    together = implementations.forward_backward(pairs)
    plain = [
        grad
        for one in pairs
        for grad in torch.autograd.grad(one.forward(), list(one.leaves.values()), one.gradients)
    ]
    assert all(map(torch.equal, plain, separate))
    assert len(together) == len(separate) == 2 * len(pairs[0].leaves)
    assert all(map(torch.equal, together, separate))


def test_the_hosts_times_by_pair_are_beside_those_of_one_call(
    benchmark: Callable[[str], Any],
) -> None:
    tables = benchmark("kernel_table")
    shape = {"T": 4096, "C": 2560, "n": 4}
    line = {"impl": "peer==1", "commit": "c", "shape": shape, "launch": "host", "metric": "fwd_bwd"}
    lines = [{**line, "value": 600.4, "floor": 100.2}]
    assert tables.host(lines).splitlines()[2:] == ["| peer==1 | 600 us | 100 us |"]
    lines += [
        {**line, "launch": "host_stage", "value": 300.0, "floor": 20.0},
        {**line, "impl": "ours", "value": 500.0, "floor": 90.0},
    ]
    assert tables.host(lines).splitlines() == [
        "| 4096, 2560, 4 | host | without work | host, of eight | without work |",
        "| --- | --- | --- | --- | --- |",
        "| peer==1 | 600 us | 100 us | 300 us | 20 us |",
        "| ours | 500 us | 90 us |  |  |",
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_line_says_where_it_comes_from(path: Path) -> None:
    for text in path.read_text().splitlines():
        line = json.loads(text)
        assert all(line[name] for name in PROVENANCE)
        assert line["benchmark"] == path.stem
        assert line["value"] >= 0 and line["unit"]


def test_the_executor_needs_less_than_100_us_for_an_action() -> None:
    path = ROOT / "benchmarks" / "results" / "cpu" / "pipeline.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    overheads = {x["impl"]: x["value"] for x in lines if x["metric"] == "overhead_per_action"}
    assert len(overheads) == 4
    assert max(overheads.values()) < 100, overheads
    predictions = [x["value"] for x in lines if x["metric"] == "simulated_over_executed"]
    assert all(abs(value - 1) < 0.1 for value in predictions)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("te_blocks", ["blocks", "block_graphs"]),
        ("multigpu", ["multigpu", "multigpu_experts", "multigpu_scaling", "p2p", "parity"]),
        ("overlap", ["overlap"]),
        ("step_graph", ["step_graphs"]),
        ("fp8_training", ["training"]),
    ],
)
def test_all_tables_of_a_file_are_printed(
    name: str, expected: list[str], benchmark: Callable[[str], Any]
) -> None:
    """Of launches by graph as well, where a table is of one."""
    tables, path = benchmark("stage_tables"), RESULTS / "h200" / f"{name}.jsonl"
    lines, printed = benchmark("kernel_table").read(path), tables.tables(str(path))
    for table in expected:
        assert getattr(tables, table)(lines) in printed, table
    if name == "overlap":
        assert tables.overlap(lines, "graph") in printed
        assert tables.slowdowns(lines, "graph") in printed


@pytest.mark.parametrize(
    ("script", "argument", "expected"),
    [
        ("kernel_table.py", "none.jsonl", "expected a results file, JSON lines, got none.jsonl"),
        ("stage_tables.py", "none.jsonl", r"expected one of te_blocks\.jsonl.* got none\.jsonl"),
        ("stage_tables.py", "none/overlap.jsonl", "results file.* got none/overlap.jsonl"),
        ("recompute_table.py", "none", "results file.* got none/recompute_memory.jsonl"),
    ],
)
def test_a_table_of_no_results_is_refused(script: str, argument: str, expected: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / script), argument, "picture.svg"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert re.search(expected, found.stderr)
