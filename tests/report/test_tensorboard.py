"""TensorBoard reads back the scalars that were written, without those a resume replaced."""

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mhc_megatron.gains import gain_magnitudes
from mhc_megatron.report.tensorboard import TensorBoardLog


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_scalars_are_read_back(tmp_path: Path) -> None:
    maps = torch.stack([torch.diag(torch.tensor([4.0, 1.0])), torch.diag(torch.tensor([0.5, 1.0]))])
    with TensorBoardLog(tmp_path) as log:
        log.write({"step": 1, "loss": 2.0, "lr": 0.5, "grad_norm": 4.0, "tokens_per_s": 8.0})
        log.write({"step": 1, "valid_loss": 3.0, "not_shown": 1.0})
        log.write_gains(1, gain_magnitudes(maps))
    log_four = pytest.approx(1.3862943, rel=1e-6)  # event files hold float32
    assert scalars(tmp_path) == {
        "loss/train": [(1, 2.0)],
        "loss/validation": [(1, 3.0)],
        "optimizer/grad_norm": [(1, 4.0)],
        "optimizer/lr": [(1, 0.5)],
        "speed/tokens_per_s": [(1, 8.0)],
        "gain_single/forward": [(1, 4.0)],
        "gain_single/backward": [(1, 4.0)],
        "gain_single/log_column": [(1, log_four)],
        "gain_composite/forward": [(1, 2.0)],
        "gain_composite/backward": [(1, 2.0)],
        "gain_composite/log_column": [(1, pytest.approx(0.6931472, rel=1e-6))],
    }


def test_a_resumed_run_hides_the_steps_it_repeats(tmp_path: Path) -> None:
    with TensorBoardLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write({"step": step, "loss": 10.0})
    with TensorBoardLog(tmp_path, done=1) as log:
        log.write({"step": 2, "loss": 20.0})
    assert scalars(tmp_path) == {"loss/train": [(1, 10.0), (2, 20.0)]}
