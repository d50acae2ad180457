"""The model in one of Megatron's distributed checkpoints (``torch_dist``), as a state dict.

Read by one process, without a model and without process groups: tensors come whole, whatever the
layout that saved them.
"""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mhc_megatron.convert.names import Names, is_hyper_connection, model_name
from mhc_megatron.errors import UserError
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.manifest import (
    CONFIG,
    MANIFEST,
    list_checkpoints,
    read_manifest,
    wrong_checksum,
    wrong_size,
)
from mhc_megatron.training.overrides import from_dict

INDEX = ".metadata"  # in every checkpoint of torch_dist
# The optimizer's states; ``chained_0.`` where Megatron chains several optimizers.
_NO_MODEL = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state")
# Layers that are alike share an entry [layers, ...]; others have their number in its name.
_STACKED = re.compile(r"(.*\blayers)\.(?!\d+\.)(.+)")
# How the experts' entries are named in a model depends on the module that computes them.
_EXPERTS = ".experts.experts."
# Norms have the names of Transformer Engine's modules, which hold them; local ones are apart.
_NORMS = {
    ".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
    ".mlp.linear_fc1.layer_norm_": ".pre_mlp_layernorm.",
}


def read_distributed(
    folder: Path, names: Names, *, only_hyper_connections: bool = False
) -> dict[str, Tensor]:
    """Tensors of a checkpoint's model on the CPU, by the names they have in the model.

    Of a run of ours that is a model with its ``transformer_impl``, of Megatron's own loop one with
    Transformer Engine's modules. States of FP8 scaling, which are no tensors, are left out.

    Args:
        folder: a ``step_*`` of ``mhc-megatron train`` or an ``iter_*`` of Megatron's own loop.
        names: whose model it is, ``ours`` or ``megatron``.
        only_hyper_connections: read nothing else.

    Raises:
        UserError: not such a folder, a damaged one, or experts' entries among the wanted.
    """
    if names == "deepseek_v4":
        raise UserError(
            f"{folder} is a folder, and DeepSeek-V4's names are read from state dicts; --from says "
            "whose names a checkpoint of Megatron has: ours or megatron"
        )
    _require_index(folder)
    _require_whole(folder)
    metadata = checkpoint.FileSystemReader(folder).read_metadata()
    stored: dict[str, Tensor] = {}
    stacks: dict[str, list[str]] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata) or _NO_MODEL.match(key):
            continue
        found = _STACKED.fullmatch(key)
        parts = [f"{found[1]}.{i}.{found[2]}" for i in range(entry.size[0])] if found else [key]
        if only_hyper_connections and not is_hyper_connection(parts[0], names):
            continue
        if _EXPERTS in key:
            raise UserError(
                f"{key} of {folder}: names of experts depend on the module that computes them; ask "
                "for the hyper-connections alone (--only-hyper-connections)"
            )
        stored[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
        stacks[key] = parts if found else []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is .*uninitialized")
        checkpoint.load(stored, storage_reader=checkpoint.FileSystemReader(folder))
    state: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        # Copies, so that a name can be saved without the rest of its stack.
        values = [part.clone() for part in tensor] if stacks[key] else [tensor]
        state |= dict(zip(stacks[key] or [key], values, strict=True))
    # In a checkpoint the final norm has the name that it has in a plain model.
    norms = _NORMS if _is_local(folder) else {}
    return {model_name(_replaced(name, norms), names): value for name, value in state.items()}


def _is_local(folder: Path) -> bool:
    file = folder / CONFIG
    if not file.is_file():
        return False
    return from_dict(TrainConfig, json.loads(file.read_text())).transformer_impl == "local"


def _replaced(name: str, parts: Mapping[str, str]) -> str:
    for stored, local in parts.items():
        name = name.replace(stored, local)
    return name


def _require_index(folder: Path) -> None:
    if (folder / INDEX).is_file():
        return
    inside = [folder, folder / "checkpoints"]
    found: list[Path] = [path for place in inside for path in list_checkpoints(place)]
    found += sorted(path for path in folder.glob("iter_*") if path.is_dir())
    if found:
        raise UserError(f"{folder} is no checkpoint, but holds some; name one, such as {found[-1]}")
    raise UserError(
        f"{folder} is not a distributed checkpoint ({INDEX} is missing); name a folder step_* of "
        "mhc-megatron train, or iter_* of Megatron's with --ckpt-format torch_dist"
    )


def _require_whole(folder: Path) -> None:
    """Raise a UserError if the manifest, which only our checkpoints have, finds damage."""
    if not (folder / MANIFEST).exists() and not (folder / CONFIG).exists():
        return
    manifest = read_manifest(folder)
    problem: Any = manifest
    if not isinstance(manifest, str):
        problem = wrong_size(folder, manifest)
        if problem is None and manifest.checksums is not None:
            problem = wrong_checksum(folder, manifest, manifest.sizes)
    if problem is not None:
        raise UserError(f"checkpoint {folder} is damaged: {problem}; take another one")
