"""The files of a run: what is written is read back, and no crash or resume spoils them."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from mhc_megatron.errors import UserError
from mhc_megatron.gains import gain_magnitudes
from mhc_megatron.report.metrics import (
    MetricsLog,
    RunInfo,
    read_gains,
    read_metrics,
    read_run,
    write_run,
)

GAINS = gain_magnitudes(torch.eye(2).expand(2, 2, 2))
NAMES = ["0.attention", "0.mlp"]


def write_steps(folder: Path, first: int, last: int, *, done: int = 0) -> None:
    with MetricsLog(folder, done=done) as log:
        for step in range(first, last + 1):
            log.write({"step": step, "loss": 2.0**-step})
            log.write_gains(step, sublayers=NAMES, gains=GAINS)


def steps(folder: Path) -> list[int]:
    found = [line["step"] for line in read_metrics(folder).lines]
    assert found == [line["step"] for line in read_gains(folder).lines]
    return found


def test_lines_are_read_back_as_written(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 5.5, "lr": 1e-4, "grad_norm": 0.1 + 0.2, "extra": 3},
        {"step": 1, "valid_loss": 5.25},
    ]
    with MetricsLog(tmp_path / "new" / "folder") as log:
        for line in lines:
            log.write(line)
    found = read_metrics(tmp_path / "new" / "folder")
    assert found.lines == lines and not found.truncated


def test_gains_have_the_documented_form(tmp_path: Path) -> None:
    write_steps(tmp_path, 3, 3)
    curves = {"forward": [1.0, 1.0], "backward": [1.0, 1.0], "log_column": [0.0, 0.0]}
    expected = {"step": 3, "sublayers": NAMES, "single": curves, "composite": curves}
    assert json.loads((tmp_path / "gains.jsonl").read_text()) == expected
    assert read_gains(tmp_path).lines == [expected]


def test_what_is_not_finite_survives_in_valid_json(tmp_path: Path) -> None:
    gains = gain_magnitudes(torch.tensor([[[math.inf]], [[0.0]]]))
    with MetricsLog(tmp_path) as log:
        log.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "x": -math.inf})
        log.write_gains(1, sublayers=NAMES, gains=gains)
    line = read_metrics(tmp_path).lines[0]
    assert math.isnan(line["loss"]) and line["grad_norm"] == math.inf and line["x"] == -math.inf
    assert read_gains(tmp_path).lines[0]["single"]["log_column"] == [math.inf, math.inf]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for name in ("metrics.jsonl", "gains.jsonl"):
        json.loads((tmp_path / name).read_text(), parse_constant=refuse)


def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write({"step": step})
            log.write_gains(step, sublayers=NAMES, gains=GAINS)
            assert steps(tmp_path) == list(range(1, step + 1))


def test_a_resumed_run_leaves_no_step_twice(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 7)  # killed after step 7, its last checkpoint after step 5
    write_steps(tmp_path, 6, 9, done=5)
    assert steps(tmp_path) == list(range(1, 10))


def test_a_new_run_in_an_old_folder_starts_empty(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 7)
    write_steps(tmp_path, 1, 2)
    assert steps(tmp_path) == [1, 2]


def test_resuming_without_earlier_metrics_just_begins(tmp_path: Path) -> None:
    write_steps(tmp_path, 6, 7, done=5)
    assert steps(tmp_path) == [6, 7]


@pytest.mark.parametrize("rest", ['{"step": 4, "lo', "{", '{"step": 4}x', "\0\0", "4"])
def test_only_a_torn_last_line_is_left_out(tmp_path: Path, rest: str) -> None:
    write_steps(tmp_path, 1, 3)
    for name in ("metrics.jsonl", "gains.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write(rest)
    assert read_metrics(tmp_path).truncated and read_gains(tmp_path).truncated
    assert steps(tmp_path) == [1, 2, 3]
    write_steps(tmp_path, 4, 4, done=3)
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert not read_metrics(tmp_path).truncated


def test_a_whole_line_without_its_newline_counts(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    found = read_metrics(tmp_path)
    assert [line["step"] for line in found.lines] == [1, 2] and not found.truncated


@pytest.mark.parametrize("done", [0, 2])
def test_a_crash_while_resuming_keeps_the_old_file(
    tmp_path: Path, done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_steps(tmp_path, 1, 3)

    def crash(source: object, target: object) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="killed"):
            MetricsLog(tmp_path, done=done)
    assert steps(tmp_path) == [1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gains.jsonl", "metrics.jsonl"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "gains.jsonl"])
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, name: str) -> None:
    write_steps(tmp_path, 1, 3)
    lines = (tmp_path / name).read_text().splitlines()
    lines[1] = "nonsense"
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    before = [(tmp_path / file).read_text() for file in ("metrics.jsonl", "gains.jsonl")]
    with pytest.raises(UserError, match=rf"{name}', line 2: 'nonsense' is not") as caught:
        MetricsLog(tmp_path, done=3)
    assert "\n" not in str(caught.value)
    assert before == [(tmp_path / file).read_text() for file in ("metrics.jsonl", "gains.jsonl")]


def test_a_broken_last_line_that_is_complete_is_no_torn_write(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(UserError, match="line 2: 'nonsense' is not"):
        read_metrics(tmp_path)


def test_missing_and_empty_folders_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run folder .*nowhere' does not exist"):
        read_metrics(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        read_metrics(tmp_path)
    for text in ("", '{"step'):
        (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(UserError, match="has no complete line"):
            read_metrics(tmp_path)
    assert read_gains(tmp_path).lines == []


def test_run_json_is_read_back(tmp_path: Path) -> None:
    info = RunInfo(
        config={"steps": 3, "model": {"residual": "mhc", "mtp_num_layers": None}},
        environment={"torch": "2.13.0", "world_size": 2},
        status="failed",
        parameters=7,
        error="loss is nan",
    )
    write_run(tmp_path / "run", info)
    assert read_run(tmp_path / "run") == info
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


def test_run_json_may_know_more_than_this_version(tmp_path: Path) -> None:
    write_run(tmp_path, RunInfo(config={}, status="running"))
    values = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**values, "later": 1}))
    assert read_run(tmp_path) == RunInfo(config={}, status="running")


@pytest.mark.parametrize("text", ["{", "[]", '{"config": {}}'])
def test_a_broken_run_json_is_a_user_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json' cannot be read"):
        read_run(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(UserError, match=r"run\.json' does not exist"):
        read_run(tmp_path)
