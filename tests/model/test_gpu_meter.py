"""Energy and utilisation of a run's GPUs, through a made-up NVML."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from mhc_megatron.report.metrics import MetricsLog
from mhc_megatron.report.run import load_run, summarise
from mhc_megatron.training import gpu_meter
from mhc_megatron.training.gpu_meter import GpuUse, meter_of, open_meter, use_of_all


class FakeNvml:
    """One GPU that takes 5 J between two questions, and is busy for 40 %."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, lacks: str = "") -> None:
        self._lacks, self._millijoules = lacks, 1_000_000

    def nvmlInit(self) -> None:
        self._ask("nvmlInit")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self._ask("nvmlDeviceGetHandleByUUID")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self._ask("nvmlDeviceGetTotalEnergyConsumption")
        assert handle == "GPU-1-2"
        self._millijoules += 5000
        return self._millijoules

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        self._ask("nvmlDeviceGetUtilizationRates")
        return SimpleNamespace(gpu=40, memory=10)

    def _ask(self, name: str) -> None:
        if name == self._lacks:
            raise self.NVMLError(f"{name}: Not Supported")


QUESTIONS = [name for name in vars(FakeNvml) if name.startswith("nvml")]


def test_a_step_is_what_came_since_the_last() -> None:
    meter, problem = meter_of(FakeNvml(), "1-2")
    assert meter is not None and not problem
    assert [meter.read() for _ in range(2)] == [GpuUse(joules=5.0, busy=0.4)] * 2


@pytest.mark.parametrize("name", QUESTIONS)
def test_what_a_driver_lacks_is_a_reason(name: str) -> None:
    assert meter_of(FakeNvml(lacks=name), "1-2") == (None, f"NVML: {name}: Not Supported")


def test_the_real_library_has_every_name_that_is_asked_for() -> None:
    assert len(QUESTIONS) == 4
    assert all(callable(getattr(pynvml, name)) for name in QUESTIONS)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """As in a run of one process on a GPU, but for the device of its reductions."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    properties = SimpleNamespace(uuid="1-2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


def test_a_rank_without_a_meter_says_why(
    one_gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gpu_meter, "_installed_nvml", lambda: None)
    with caplog.at_level(logging.WARNING):
        assert open_meter() is None
    [record] = caplog.records
    assert record.getMessage() == (
        "energy and utilisation of the GPU are not recorded: nvidia-ml-py is not installed "
        "(pip install 'mhc-megatron[gpu]')"
    )
    monkeypatch.setattr(gpu_meter, "_installed_nvml", FakeNvml)
    meter = open_meter()
    assert meter is not None
    assert use_of_all(meter.read(), "cpu") == GpuUse(joules=5.0, busy=0.4)


def test_without_a_gpu_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert open_meter() is None
    assert not caplog.records


def test_the_report_has_the_medians(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write({"step": step, "loss": 1.0, "joules_per_token": step / 8, "gpu_busy": 0.5})
    numbers = summarise("run", load_run(tmp_path))
    assert (numbers.joules_per_token, numbers.gpu_busy) == (0.25, 0.5)
