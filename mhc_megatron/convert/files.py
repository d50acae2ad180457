"""State dicts as files: what ``torch.save`` writes, and ``.safetensors``."""

import importlib
import os
import pickle
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mhc_megatron.errors import UserError


def read_state(path: Path) -> dict[str, Any]:
    """A state dict on the CPU.

    Raises:
        UserError: no such file, no state dict in it, or a ``.safetensors`` without that library.
    """
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; name what torch.save or safetensors has written, or the "
            "folder of a distributed checkpoint"
        )
    if path.suffix == ".safetensors":
        loaded: dict[str, Any] = _safetensors(path).load_file(path)
        return loaded
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} is not a state dict: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(
            f"{path} holds a {type(state).__name__}, not a dictionary of tensors by name"
        )
    return state


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a state dict, whole or not at all.

    Raises:
        UserError: the file is there already, or is a ``.safetensors`` without that library.
    """
    if path.exists():
        raise UserError(f"{path} exists; remove it or choose another --out")
    partial = path.with_name(f".partial-{path.name}")
    try:
        if path.suffix == ".safetensors":
            tensors = {name: value.contiguous() for name, value in state.items()}
            _safetensors(path).save_file(tensors, partial)
        else:
            torch.save(dict(state), partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _safetensors(path: Path) -> types.ModuleType:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise UserError(
            f"{path} needs the library safetensors (pip install safetensors); files with any other "
            "ending are torch.save's"
        ) from error
