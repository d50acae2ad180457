"""One release of cuDNN in a process that uses Transformer Engine."""

import contextlib
import ctypes
from pathlib import Path

import torch

_MAPS = Path("/proc/self/maps")


def load_torchs_cudnn() -> None:
    """Load all libraries of the cuDNN that torch has loaded a part of.

    cuDNN is many libraries, and torch loads most of them when they are first needed. Transformer
    Engine links some: imported earlier, it makes the dynamic linker take them from the system,
    where they may be of another release, and fails with an undefined symbol or a "version
    incompatibility". Call this before ``transformer_engine`` is imported, by megatron-core for
    example. Without CUDA, or where there is no /proc, it does nothing.
    """
    torch.backends.cudnn.version()  # loads the first part
    if not _MAPS.exists():
        return
    mapped = {Path(line.split()[-1]) for line in _MAPS.read_text().splitlines() if "/" in line}
    folders = {path.parent for path in mapped if path.name.startswith("libcudnn")}
    for library in sorted(path for folder in folders for path in folder.glob("libcudnn*.so.*")):
        # One that cannot be loaded could not have been used either.
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(library))
