"""Reading GPUs through a made-up NVML."""

from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from mhc_megatron.launch.gpus import Gpu, Gpus, read_gpus


class FakeNvml:
    """pynvml's functions over dictionaries; what a device does not list raises, as in pynvml."""

    NVML_NVLINK_MAX_LINKS = 36
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0
    NVML_CLOCK_SM = 1

    class NVMLError(Exception):
        pass

    def __init__(self, *devices: dict[str, Any], fails_in: str = "") -> None:
        self.devices = devices
        self.fails_in = fails_in
        self.open = False

    def nvmlInit(self) -> None:
        if self.fails_in == "nvmlInit":
            raise self.NVMLError("NVML Shared Library Not Found")
        self.open = True

    def nvmlShutdown(self) -> None:
        self.open = False

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.1"

    def nvmlDeviceGetCount(self) -> int:
        if self.fails_in == "nvmlDeviceGetCount":
            raise self.NVMLError("Unknown Error")
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        return self.devices[index]

    def _ask(self, device: dict[str, Any], name: str) -> Any:
        assert self.open
        if name not in device:
            raise self.NVMLError("Not Supported")
        return device[name]

    def nvmlDeviceGetName(self, device: dict[str, Any]) -> str:
        return self._ask(device, "name")

    def nvmlDeviceGetMemoryInfo(self, device: dict[str, Any]) -> SimpleNamespace:
        return SimpleNamespace(total=self._ask(device, "memory"))

    def nvmlDeviceGetNvLinkState(self, device: dict[str, Any], link: int) -> int:
        links = self._ask(device, "links")
        if link >= len(links):
            raise self.NVMLError("Invalid Argument")
        return links[link]

    def nvmlDeviceGetTotalEccErrors(self, device: dict[str, Any], kind: int, counter: int) -> int:
        assert (kind, counter) == (1, 0)
        return self._ask(device, "ecc")

    def nvmlDeviceGetClockInfo(self, device: dict[str, Any], clock: int) -> int:
        return self._ask(device, "clock")

    def nvmlDeviceGetMaxClockInfo(self, device: dict[str, Any], clock: int) -> int:
        return self._ask(device, "max_clock")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, device: dict[str, Any]) -> int:
        return self._ask(device, "reasons")


def test_a_full_device() -> None:
    nvml = FakeNvml(
        {
            "name": "NVIDIA H100",
            "memory": 80 * 2**30,
            "links": [1, 1, 0],
            "ecc": 2,
            "clock": 345,
            "max_clock": 1980,
            "reasons": 0x1 | 0x4 | 0x40,
        }
    )
    gpu = Gpu(
        name="NVIDIA H100",
        memory_bytes=80 * 2**30,
        links_up=2,
        links=3,
        ecc_errors=2,
        clock_mhz=345,
        max_clock_mhz=1980,
        throttling=("power cap", "hardware thermal slowdown"),
    )
    assert read_gpus(nvml) == Gpus(driver="580.1", devices=(gpu,))
    assert not nvml.open


def test_a_device_that_tells_nothing_but_its_name() -> None:
    assert read_gpus(FakeNvml({"name": "T4"}, {"name": "T4"})).devices == (
        Gpu(name="T4"),
        Gpu(name="T4"),
    )


@pytest.mark.parametrize(
    ("nvml", "problem"),
    [
        (None, "nvidia-ml-py is not installed"),
        (
            FakeNvml(fails_in="nvmlInit"),
            "no NVIDIA driver answers (NVML Shared Library Not Found)",
        ),
        (FakeNvml(fails_in="nvmlDeviceGetCount"), "the NVIDIA driver fails: Unknown Error"),
    ],
    ids=["no library", "no driver", "broken driver"],
)
def test_no_gpus_is_a_reason_and_no_exception(nvml: FakeNvml | None, problem: str) -> None:
    assert read_gpus(nvml) == Gpus(problem=problem)


def test_no_device() -> None:
    assert read_gpus(FakeNvml()) == Gpus(driver="580.1")


def test_the_real_library_has_every_name_that_is_asked_for() -> None:
    for name in vars(FakeNvml):
        if name.startswith(("nvml", "NVML")):
            assert hasattr(pynvml, name)
    for bit, name in (
        (0x04, "SwPowerCap"),
        (0x08, "HwSlowdown"),
        (0x20, "SwThermalSlowdown"),
        (0x40, "HwThermalSlowdown"),
        (0x80, "HwPowerBrakeSlowdown"),
    ):
        assert getattr(pynvml, f"nvmlClocksThrottleReason{name}") == bit
