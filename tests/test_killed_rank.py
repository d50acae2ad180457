"""``mhc-megatron train`` after a rank was killed: the launcher's status, and where the rank was."""

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest

from mhc_megatron.report.heartbeat import Beat, beat_file, encode
from mhc_megatron.training import cli
from mhc_megatron.training.config import TrainConfig


@pytest.mark.parametrize(("number", "said"), [(signal.SIGKILL, True), (signal.SIGTERM, False)])
def test_its_last_action_and_who_waits_for_it(
    number: int,
    said: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def launch(*args: Any, **options: Any) -> int:
        waiting = Beat(rank=0, host="here", step=7, phase=3, doing="recv 1I2 from 1", waits_for=1)
        gone = dataclasses.replace(waiting, rank=1, doing="1I2", waits_for=None)
        for beat in (waiting, gone):
            file = beat_file(tmp_path, beat.rank)
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(encode(beat))
        return 128 + number

    monkeypatch.setattr(cli, "launch_local", launch)
    assert cli.train_locally(TrainConfig(out=str(tmp_path))) == 128 + number
    error = capsys.readouterr().err
    assert ("rank 1 (here) at 1I2 of step 7" in error) == said
    assert error.endswith("; rank 0 waits for it\n") == said
