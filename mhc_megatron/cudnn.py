"""One release of cuDNN in a process that uses Transformer Engine."""

import contextlib
import ctypes
from pathlib import Path

import torch

from mhc_megatron.launch.environment import look_for_cudnn_in

_MAPS = Path("/proc/self/maps")


def load_torchs_cudnn() -> None:
    """Load the cuDNN that torch has loaded a part of, all of it, and let Transformer Engine use it.

    cuDNN is many libraries, and torch loads most of them when they are first needed. Transformer
    Engine links some, and opens ``libcudnn.so`` by itself, at ``CUDNN_HOME`` before it asks the
    system. Where the system has another release, it fails with an undefined symbol or a "version
    incompatibility", or finds no fused attention (CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED, said only
    with NVTE_DEBUG=1) and computes it several times slower without. Call this before
    ``transformer_engine`` is imported, by megatron-core for example: it sets ``CUDNN_HOME``.
    Without CUDA, or where there is no /proc, it does nothing.
    """
    torch.backends.cudnn.version()  # loads the first part
    folders = sorted({path.parent for path in _loaded()})
    for library in sorted(path for folder in folders for path in folder.glob("libcudnn*.so.*")):
        # One that cannot be loaded could not have been used either. Global: what Transformer Engine
        # takes from a library that it opens itself would go before torch's.
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    if folders:
        look_for_cudnn_in(folders[0])


def _loaded() -> set[Path]:
    """The files of cuDNN in this process."""
    if not _MAPS.exists():
        return set()
    mapped = {Path(line.split()[-1]) for line in _MAPS.read_text().splitlines() if "/" in line}
    return {path for path in mapped if path.name.startswith("libcudnn")}
