"""Comparisons: the table as golden text, the page, and the command."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mhc_megatron.errors import UserError
from mhc_megatron.gains import gain_magnitudes
from mhc_megatron.report import cli
from mhc_megatron.report.compare import format_table, summaries, write_comparison
from mhc_megatron.report.metrics import MetricsLog
from mhc_megatron.report.run import Summary
from mhc_megatron.report.table import number

MakeRun = Callable[..., Path]

GOLDEN = """\
variant        steps  train loss  valid loss  gain fwd   gain bwd  |log col|  step ms  time ratio
-------------  -----  ----------  ----------  --------  ---------  ---------  -------  ----------
plain          1,200      2.3457      2.4000         -          -          -    100.0        1.00
hc             1,200      2.3000      2.3900    58.123      3,012      8.010    110.0        1.10
mhc            1,200      2.2900           -     1.000      1.602      0.470    1,207       12.07
unconstrained      7         nan         inf       inf  1.23e+300        inf        -           -"""


def row(name: str, **values: float) -> Summary:
    fields: dict[str, float | None] = {
        "train_loss": None,
        "valid_loss": None,
        "gain_forward": None,
        "gain_backward": None,
        "log_column": None,
        "step_ms": None,
        "tokens_per_s": None,
    }
    return Summary(name=name, **{"steps": 1200, **fields, **values})  # type: ignore[arg-type]


def test_the_table_as_text() -> None:
    rows = [
        row("plain", train_loss=2.34567, valid_loss=2.4, step_ms=100.0),
        row(
            "hc",
            train_loss=2.3,
            valid_loss=2.39,
            gain_forward=58.1234,
            gain_backward=3012.3,
            log_column=math.log(3012.3),
            step_ms=110.0,
        ),
        row(
            "mhc",
            train_loss=2.29,
            gain_forward=1.0,
            gain_backward=1.602,
            log_column=0.47,
            step_ms=1206.7,
        ),
        row(
            "unconstrained",
            steps=7,
            train_loss=math.nan,
            valid_loss=math.inf,
            gain_forward=math.inf,
            gain_backward=1.234e300,
            log_column=math.inf,
        ),
    ]
    assert format_table(rows) == GOLDEN


def test_numbers_stay_readable_at_any_size() -> None:
    values = [0.0, 1e-9, 0.0004, 0.0006, 1, 999.9994, 123456.7, 1e7, -2.5]
    assert [number(value) for value in values] == [
        "0.000",
        "1.00e-09",
        "4.00e-04",
        "0.001",
        "1.000",
        "999.999",
        "123,457",
        "1.00e+07",
        "-2.500",
    ]


def test_a_summary_takes_the_tail_of_the_loss_and_the_peaks_of_the_composite_gains(
    tmp_path: Path,
) -> None:
    with MetricsLog(tmp_path) as log:
        for step in range(1, 41):
            loss = {39: 3.0, 40: 5.0}.get(step, 100.0)
            log.write({"step": step, "loss": loss, "step_ms": 1e9 if step == 1 else 8.0})
            log.write({"step": step, "valid_loss": step / 4})
        for step, scale in ((10, 2.0), (20, 0.5), (30, 1.0)):
            maps = scale * torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
            log.write_gains(step, sublayers=["a", "b", "c"], gains=gain_magnitudes(maps))
    assert summaries({"x": tmp_path}) == [
        Summary(
            name="x",
            steps=40,
            train_loss=4.0,
            valid_loss=10.0,
            gain_forward=8.0,
            gain_backward=8.0,
            log_column=torch.tensor(8.0, dtype=torch.float64).log().item(),
            step_ms=8.0,
            tokens_per_s=None,
        )
    ]


def test_a_comparison_shows_every_run(tmp_path: Path, make_run: MakeRun) -> None:
    folders = {name: make_run(tmp_path / name, name) for name in ("plain", "hc", "mhc")}
    path = write_comparison(folders, tmp_path / "new" / "comparison.html")
    text = path.read_text()
    assert text.count("<svg") == 9
    for section in ("summary", "loss", "grad-norm", "gains-training", "gains-depth", "log-column"):
        assert f'<section id="{section}">' in text
    assert "Training loss minus plain" in text and "time ratio: to plain" in text
    assert "plain: This run uses Megatron&#x27;s plain residual connection" in text


def test_a_comparison_without_any_gains_says_why(tmp_path: Path, make_run: MakeRun) -> None:
    folders = {name: make_run(tmp_path / name, "plain") for name in ("a", "b")}
    text = write_comparison(folders, tmp_path / "comparison.html").read_text()
    assert text.count("<svg") == 4
    assert text.count("it has no residual mappings") == 2


def test_runs_of_different_lengths_are_compared_where_they_overlap(
    tmp_path: Path, make_run: MakeRun
) -> None:
    folders = {
        "short": make_run(tmp_path / "short", steps=1, probe_every=1),
        "long": make_run(tmp_path / "long", steps=90),
    }
    assert "<svg" in write_comparison(folders, tmp_path / "comparison.html").read_text()


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args(arguments))


def test_the_command_reports_one_run(
    tmp_path: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run")
    assert command(str(folder)) == 0
    assert capsys.readouterr().out == f"report: {folder / 'report.html'}\n"
    assert (folder / "report.html").is_file()


def test_the_command_compares_several_runs(
    tmp_path: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [make_run(tmp_path / name, name) for name in ("plain", "mhc")]
    assert command(*map(str, folders)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "variant",
        "-------",
        "plain",
        "mhc",
        "comparison:",
    ]
    assert lines[-1] == f"comparison: {tmp_path / 'comparison.html'}"
    assert command(*map(str, folders), "--out", str(tmp_path / "other.html")) == 0
    assert (tmp_path / "other.html").read_bytes() == (tmp_path / "comparison.html").read_bytes()


def test_runs_of_the_same_name_are_told_apart_by_their_paths(
    tmp_path: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [make_run(tmp_path / parent / "run") for parent in ("a", "b")]
    assert command(*map(str, folders)) == 0
    assert str(folders[1]) in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path: Path, make_run: MakeRun) -> None:
    folder = str(make_run(tmp_path / "run"))
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "does not exist"),
        ([str(empty)], "has no metrics.jsonl"),
        ([folder, str(empty)], "has no metrics.jsonl"),
        ([folder, folder], "named twice"),
        ([folder, "--out", "x.html"], "--out=x.html is for comparisons"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            command(*arguments)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "comparison.html").exists()
    with pytest.raises(UserError, match="no run folders"):
        write_comparison({}, tmp_path / "comparison.html")
