"""What of Transformer Engine this process has, and a layer is made of."""

import importlib.metadata
import importlib.util

import torch
from packaging.version import Version

from mhc_megatron.fp8 import Platform


def this_platform() -> Platform:
    """The platform of this process; imports no Transformer Engine."""
    try:
        engine = Version(importlib.metadata.version("transformer-engine"))
    except importlib.metadata.PackageNotFoundError:
        engine = None
    cuda = torch.version.cuda
    return Platform(
        transformer_engine=engine,
        capability=torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
        cuda=None if cuda is None else Version(cuda),
    )


def refuses_pickled_scales() -> bool:
    """Whether Transformer Engine loads delayed scaling's state only where it is allowed to."""
    if importlib.util.find_spec("transformer_engine") is None:
        return False
    return importlib.util.find_spec("transformer_engine.pytorch._extra_state") is not None


def engine_weights(layer: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that Transformer Engine's modules in ``layer`` multiply with."""
    return {
        f"{prefix}.{name}" if prefix else name: tuple(parameter.shape)
        for prefix, module in layer.named_modules()
        if _is_transformer_engine(module)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1
    }


def _is_transformer_engine(module: torch.nn.Module) -> bool:
    """Whether its class, or one that it inherits from, is one of Transformer Engine's modules."""
    return any(_defined_in(cls) for cls in type(module).__mro__)


def _defined_in(cls: type) -> bool:
    return cls.__module__.startswith("transformer_engine.pytorch.module.")
