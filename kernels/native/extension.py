"""replay.cpp, if it is built for this Python and torch."""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch

BUILD = "MHC_MEGATRON_NATIVE=1 pip install --no-build-isolation --no-deps --force-reinstall ."
# Of what replay.cpp takes; the same number stands there.
_VERSION = 2


@cache
def extension() -> tuple[ModuleType | None, str]:
    """The module, or None; and what it was built for, or why it is not there."""
    try:
        module = import_module("mhc_megatron.kernels.native._replay")
    except ModuleNotFoundError:
        return None, "is not built"
    except ImportError as error:
        return None, f"does not import: {error}"
    release = torch.__version__.partition("+")[0]
    if module.torch_version != release:
        return None, f"is built for torch {module.torch_version}, not {release}"
    if module.version != _VERSION:
        return None, "is built from other sources than these"
    if obstacle := module.obstacle():
        return None, obstacle
    return module, f"built for torch {release}"


def availability() -> tuple[bool, str]:
    """Whether it can be used; and what it was built for, or why it cannot."""
    module, reason = extension()
    return module is not None, reason


def missing() -> str | None:
    """Why it does not launch the kernels, and the remedy; None where it does."""
    available, reason = availability()
    return None if available else f"the launch extension {reason}; {BUILD}"
