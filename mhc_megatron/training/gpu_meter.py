"""Energy and utilisation of the GPUs that a run trains on, from NVML, step by step."""

import importlib
import logging
from dataclasses import dataclass
from typing import Any

import torch

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GpuUse:
    """What one step took of all GPUs of a run.

    Attributes:
        joules: energy, the sum of all GPUs.
        busy: share of the last sample period (up to a second, as NVML keeps it) in which kernels
            ran, 0 to 1, the mean of all GPUs.
    """

    joules: float
    busy: float


class GpuMeter:
    """Reads one GPU's counters.

    Args:
        nvml: the module ``pynvml`` of nvidia-ml-py.
        uuid: of the GPU, as CUDA tells it.

    Raises:
        nvml.NVMLError: the driver does not answer, or the GPU has no energy counter.
    """

    def __init__(self, nvml: Any, uuid: str) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        self._handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        self._last = self._millijoules()

    def read(self) -> GpuUse:
        """Energy since the last call, or since the meter was made, and the utilisation now."""
        last, self._last = self._last, self._millijoules()
        rates = self._nvml.nvmlDeviceGetUtilizationRates(self._handle)
        return GpuUse(joules=(self._last - last) / 1e3, busy=rates.gpu / 100)

    def _millijoules(self) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))


def open_meter() -> GpuMeter | None:
    """This rank's meter; None on all ranks if one of them has none, which says why once.

    Called by all ranks together. On the CPU there is nothing to read, and nothing is said.
    """
    if not torch.cuda.is_available():
        return None
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    meter, problem = meter_of(_installed_nvml(), uuid)
    if problem:
        _LOGGER.warning("energy and utilisation of the GPU are not recorded: %s", problem)
    everywhere = torch.tensor(float(meter is not None), device=torch.cuda.current_device())
    torch.distributed.all_reduce(everywhere, op=torch.distributed.ReduceOp.MIN)
    return meter if everywhere.item() else None


def meter_of(nvml: Any, uuid: str) -> tuple[GpuMeter | None, str]:
    """A meter, or why there is none.

    Args:
        nvml: ``pynvml``, or None where it is not installed.
        uuid: of the GPU.
    """
    if nvml is None:
        return None, "nvidia-ml-py is not installed (pip install 'mhc-megatron[gpu]')"
    try:
        meter = GpuMeter(nvml, uuid)
        meter.read()
    except nvml.NVMLError as error:
        return None, f"NVML: {error}"
    return meter, ""


def use_of_all(own: GpuUse, device: Any) -> GpuUse:
    """Over all ranks, which call it together after a step.

    Args:
        own: this rank's.
        device: of the reduction.
    """
    both = torch.tensor([own.joules, own.busy], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(both)
    joules, busy = both.tolist()
    return GpuUse(joules=joules, busy=busy / torch.distributed.get_world_size())


def _installed_nvml() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return None
