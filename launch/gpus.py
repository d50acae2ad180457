"""The GPUs of this machine as NVIDIA's management library (NVML) sees them, without CUDA."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

_Value = TypeVar("_Value")

# Bits of nvmlDeviceGetCurrentClocksThrottleReasons. Left out are idleness and clocks that someone
# set, which are no trouble.
_THROTTLING = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
POWER_CAP = _THROTTLING[0x04]


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU; None where the device or its driver does not tell.

    Attributes:
        memory_bytes: total memory.
        links_up, links: NVLinks that work, and that the device has (0 without NVLink).
        ecc_errors: uncorrected memory errors since the driver was loaded.
        clock_mhz, max_clock_mhz: of the multiprocessors, now and at most.
        throttling: what holds the clock down now.
    """

    name: str
    memory_bytes: int | None = None
    links_up: int = 0
    links: int = 0
    ecc_errors: int | None = None
    clock_mhz: int | None = None
    max_clock_mhz: int | None = None
    throttling: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """All GPUs, or why they cannot be seen.

    Attributes:
        problem: empty when NVML answered.
    """

    driver: str = ""
    devices: tuple[Gpu, ...] = ()
    problem: str = ""


def read_gpus(nvml: Any) -> Gpus:
    """Ask NVML for its devices.

    Args:
        nvml: the module ``pynvml`` of nvidia-ml-py, or None where it is not installed.
    """
    if nvml is None:
        return Gpus(problem="nvidia-ml-py is not installed")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Gpus(problem=f"no NVIDIA driver answers ({error})")
    try:
        return Gpus(
            driver=_text(nvml.nvmlSystemGetDriverVersion()),
            devices=tuple(
                _read_gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(index))
                for index in range(nvml.nvmlDeviceGetCount())
            ),
        )
    except nvml.NVMLError as error:
        return Gpus(problem=f"the NVIDIA driver fails: {error}")
    finally:
        nvml.nvmlShutdown()


def _read_gpu(nvml: Any, handle: Any) -> Gpu:
    def ask(question: Callable[..., _Value], *arguments: Any) -> _Value | None:
        try:
            return question(handle, *arguments)
        except nvml.NVMLError:  # most devices lack some of these
            return None

    links = [ask(nvml.nvmlDeviceGetNvLinkState, n) for n in range(nvml.NVML_NVLINK_MAX_LINKS)]
    memory = ask(nvml.nvmlDeviceGetMemoryInfo)
    reasons = ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons) or 0
    return Gpu(
        name=_text(nvml.nvmlDeviceGetName(handle)),
        memory_bytes=None if memory is None else memory.total,
        links_up=sum(link == 1 for link in links),
        links=sum(link is not None for link in links),
        ecc_errors=ask(
            nvml.nvmlDeviceGetTotalEccErrors,
            nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
            nvml.NVML_VOLATILE_ECC,
        ),
        clock_mhz=ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        max_clock_mhz=ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
        throttling=tuple(name for bit, name in _THROTTLING.items() if reasons & bit),
    )


def _text(value: str | bytes) -> str:
    # nvidia-ml-py 12 returns str from every function that older releases gave bytes from.
    return value.decode() if isinstance(value, bytes) else value
