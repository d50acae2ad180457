"""The kernels that Hopper GPUs have of their own, in Gluon, of Triton 3.6 and later."""

import warnings
from functools import cache

import torch
import triton

HOPPER = (9, 0)
OLDEST_TRITON = (3, 6)

if tuple(map(int, triton.__version__.split(".")[:2])) >= OLDEST_TRITON:
    from mhc_megatron.kernels.triton.hopper_mix_forward import hopper_mix_fwd
    from mhc_megatron.kernels.triton.hopper_pre_backward import hopper_pre_bwd
    from mhc_megatron.kernels.triton.hopper_weight_backward import hopper_weight_bwd
else:
    hopper_mix_fwd = hopper_pre_bwd = hopper_weight_bwd = None


@cache
def runs_on(device: torch.device) -> bool:
    """Whether they run there; says so once where only Triton is too old."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != HOPPER:
        return False
    if hopper_pre_bwd is None:
        warnings.warn(
            f"Hopper's own kernels need triton>={'.'.join(map(str, OLDEST_TRITON))}, not "
            f"{triton.__version__}: those for every GPU run instead",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
