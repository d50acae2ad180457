"""The kernels that Hopper GPUs have of their own, in Gluon, of Triton 3.6 and later."""

import warnings
from functools import cache

import torch

try:
    from mhc_megatron.kernels.triton.hopper_pre_backward import hopper_pre_bwd
except (ImportError, AttributeError):
    hopper_pre_bwd = None

HOPPER = (9, 0)


@cache
def runs_on(device: torch.device) -> bool:
    """Whether they run there; says so once where only Triton is too old."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != HOPPER:
        return False
    if hopper_pre_bwd is None:
        warnings.warn(
            "hopper_pre_bwd needs triton>=3.6: pre_bwd or wide_pre_bwd runs instead",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
