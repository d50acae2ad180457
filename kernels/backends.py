"""Which implementation runs, and why the Triton kernels cannot where they cannot."""

import importlib.util
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mhc_megatron.kernels.native.extension import missing
from mhc_megatron.kernels.options import MappingOptions

Backend = Literal["auto", "triton", "native", "reference"]

KERNEL_STREAMS = (1, 2, 3, 4, 8)
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNEL_PERMUTATION_STREAMS = 4
KERNEL_CAPABILITY = (9, 0)
# 16-byte loads of half-precision channels.
KERNEL_CHANNEL_MULTIPLE = 8

# Found once: torch.compile cannot trace the search.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
NO_EXTENSION = missing()


class BackendChoice(NamedTuple):
    """``triton`` or ``reference``, and in one sentence why."""

    name: str
    reason: str


_ASKED_FOR = BackendChoice("triton", "asked for")
_LAUNCHED = (
    "launched by the extension" if NO_EXTENSION is None else f"launched by Python: {NO_EXTENSION}"
)
_SUPPORTED = BackendChoice("triton", f"the kernels support these streams; {_LAUNCHED}")


def choose_backend(
    streams: Tensor,
    *,
    options: MappingOptions | None = None,
    num_streams: int | None = None,
    backend: Backend = "auto",
) -> BackendChoice:
    """What ``backend`` means for these streams.

    ``auto`` takes the kernels on CUDA wherever they can run, never Triton's interpreter.

    Args:
        streams: [..., n, C].
        options: of the mappings; None for ``post``, which has none.
        num_streams: n of ``expand``, which has none yet; None for the n of ``streams``.
        backend: as for ``pre``, ``post`` and ``post_pre``.

    Returns:
        ``triton`` for ``native`` too: the same kernels.

    Raises:
        ValueError: ``triton`` or ``native`` cannot run, and why; or there is no such backend.
    """
    if backend == "reference":
        return BackendChoice("reference", "asked for")
    if backend not in ("auto", "triton", "native"):
        raise ValueError(f"backend={backend!r} is not one of auto, triton, native, reference")
    obstacle = _obstacle(streams, num_streams or streams.shape[-2], options)
    if backend == "native":
        obstacle = obstacle or NO_EXTENSION
    if backend != "auto":
        if obstacle is not None:
            raise ValueError(f"backend={backend!r} cannot run: {obstacle}")
        return _ASKED_FOR
    if obstacle is None and not streams.is_cuda:
        obstacle = "the interpreter is for tests, and has to be asked for"
    if obstacle is not None:
        return BackendChoice("reference", obstacle)
    return _SUPPORTED


def _obstacle(streams: Tensor, n: int, options: MappingOptions | None) -> str | None:
    """Why the kernels cannot take these streams."""
    permutes = options is not None and options.projection == "permutation"
    obstacle = _obstacle_of(n, streams.shape[-1], streams.dtype, permutes)
    if obstacle is not None:
        return obstacle
    if not streams.is_contiguous():
        return "streams are not contiguous"
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if not streams.is_cuda:
        # Imports triton, which a program without a GPU need not have.
        from mhc_megatron.kernels.triton.arguments import INTERPRETED

        if streams.device.type == "cpu" and INTERPRETED:
            return None
        return f"streams are on {streams.device.type}, and the kernels need CUDA"
    index = streams.get_device()
    if index != torch.cuda.current_device():
        return (
            f"streams are on {streams.device} while the current device is "
            f"cuda:{torch.cuda.current_device()}; call torch.cuda.set_device first"
        )
    if _capability(index) < KERNEL_CAPABILITY:
        return "the GPU is older than compute capability 9.0, whose shared memory the tiles need"
    return None


# All are asked for at every call, between launches that take microseconds.
@cache
def _obstacle_of(n: int, channels: int, dtype: torch.dtype, permutes: bool) -> str | None:
    if n not in KERNEL_STREAMS:
        return f"num_streams={n} is not one of {', '.join(map(str, KERNEL_STREAMS))}"
    if permutes and n > KERNEL_PERMUTATION_STREAMS:
        return f"projection='permutation' needs num_streams <= {KERNEL_PERMUTATION_STREAMS}"
    if dtype not in KERNEL_DTYPES:
        return f"streams are {dtype}, not bfloat16, float16 or float32"
    if channels == 0 or channels % KERNEL_CHANNEL_MULTIPLE:
        return f"channels={channels} is not a multiple of {KERNEL_CHANNEL_MULTIPLE}"
    return None


@cache
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)
