"""What one training needs of the machine: the part of the doctor that knows recipes. Pure."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

from packaging.version import Version

from mhc_megatron.errors import UserError
from mhc_megatron.fp8 import Platform, reject_unsupported_precision
from mhc_megatron.launch.checks import (
    DATA_HELPER,
    Check,
    Status,
    collect,
    package,
    pip_install,
    supported,
)
from mhc_megatron.launch.machine import Machine
from mhc_megatron.training.config import TrainConfig

_BF16_CAPABILITY = (8, 0)
# core < 0.17 calls Transformer Engine's functions in MoE routers and MLA without importing them.
_FIRST_WITHOUT_TE = Version("0.17")
_TOKENIZER_PACKAGES = {"tiktoken": "tiktoken", "hf": "transformers"}


def recipe_checks(config: TrainConfig, machine: Machine) -> list[Check]:
    """What ``config`` needs and this machine has; no row is ``missing`` if it can run here.

    GPUs are used where torch can use them, else the CPU, as the trainer does.
    """
    return [
        *_software(machine),
        _processes(config, machine),
        *_dtype(config, machine),
        *_transformer_engine(config, machine),
        *_fp8(config, machine),
        *_data(config, machine),
    ]


def _software(machine: Machine) -> Iterator[Check]:
    """The general rows again; a version that is not supported is not what the recipe needs."""
    dependencies = [name for name, wanted in supported().items() if wanted.marker is None]
    backend = "NCCL" if _on_gpu(machine) else "gloo"
    for check in collect(machine):
        if check.name in ("python", *dependencies, DATA_HELPER, backend):
            status: Status = "ok" if check.status == "ok" else "missing"
            yield dataclasses.replace(check, status=status)


def _processes(config: TrainConfig, machine: Machine) -> Check:
    layout = config.parallel
    ranks = layout.world_size
    sizes = {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "context": layout.context,
        "data": layout.data,
    }
    factors = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    name = f"{ranks} processes ({factors})" if factors else "1 process"
    if _on_gpu(machine):
        assert machine.torch is not None
        gpus = len(machine.torch.capabilities)
        if ranks <= gpus:
            return Check(name=name, status="ok", found=f"{gpus} GPUs")
        return Check(
            name=name,
            status="missing",
            found=f"{gpus} GPUs",
            note=f"each process needs one; make parallel.* smaller, or start it with torchrun on "
            f"{math.ceil(ranks / gpus)} such machines",
        )
    cores = f"{machine.cores} CPU cores"
    if ranks <= machine.cores:
        return Check(name=name, status="ok", found=cores)
    return Check(
        name=name, status="warn", found=cores, note="processes share cores: it runs, but slowly"
    )


def _dtype(config: TrainConfig, machine: Machine) -> Iterator[Check]:
    if config.dtype == "fp32":
        return
    name = f"dtype={config.dtype}"
    if not _on_gpu(machine):
        yield Check(
            name=name, status="missing", found="no GPU in torch", note="set dtype=fp32 on a CPU"
        )
        return
    assert machine.torch is not None
    oldest = min(machine.torch.capabilities)
    found = f"compute capability {oldest[0]}.{oldest[1]}"
    if config.dtype == "bf16" and oldest < _BF16_CAPABILITY:
        yield Check(name=name, status="missing", found=found, note="bf16 needs 8.0; set dtype=fp16")
    else:
        yield Check(name=name, status="ok", found=found)


def _fp8(config: TrainConfig, machine: Machine) -> Iterator[Check]:
    if config.fp8 is None or not _on_gpu(machine):  # without a GPU, Transformer Engine is missing
        return
    assert machine.torch is not None
    engine = machine.versions.get("transformer-engine")
    name, capability = f"fp8_recipe={config.fp8_recipe}", min(machine.torch.capabilities)
    platform = Platform(
        transformer_engine=None if engine is None else Version(engine),
        capability=capability,
        cuda=None if machine.torch.cuda is None else Version(machine.torch.cuda),
    )
    found = f"compute capability {capability[0]}.{capability[1]}, CUDA {machine.torch.cuda}"
    try:
        reject_unsupported_precision(config, platform)
    except UserError as error:
        yield Check(name=name, status="missing", found=found, note=str(error))
    else:
        yield Check(name=name, status="ok", found=found)


def _transformer_engine(config: TrainConfig, machine: Machine) -> Iterator[Check]:
    requirement = supported()["transformer-engine"]
    check = package(machine, requirement)
    usable = check.status != "missing"
    install = f"install it with: {pip_install(requirement)}"
    if config.transformer_impl == "transformer_engine":
        if not usable:
            yield Check(
                name="transformer-engine",
                status="missing",
                found=check.found,
                note=f"{install}; or set transformer_impl=local",
            )
        elif not _on_gpu(machine):
            yield Check(
                name="transformer-engine",
                status="missing",
                found=f"{check.found}, but no GPU in torch",
                note="it needs a GPU; set transformer_impl=local",
            )
        else:
            yield check
    core = machine.core
    if usable or core is None or Version(core.version) >= _FIRST_WITHOUT_TE:
        return
    for wanted, what, remedy in (
        (
            config.model.num_moe_experts is not None,
            "MoE layers",
            "model.num_moe_experts=none",
        ),
        (
            config.model.multi_latent_attention,
            "multi-latent attention",
            "model.multi_latent_attention=false",
        ),
    ):
        if wanted:
            yield Check(
                name=what,
                status="missing",
                found=f"megatron-core {core.version} without Transformer Engine",
                note=f"this megatron-core calls Transformer Engine there; {install}, or use "
                f"megatron-core >= {_FIRST_WITHOUT_TE}, or set {remedy}",
            )


def _data(config: TrainConfig, machine: Machine) -> Iterator[Check]:
    kind = config.data.tokenizer.partition(":")[0]
    needed = _TOKENIZER_PACKAGES.get(kind)
    if needed is not None:
        version = machine.versions.get(needed)
        yield Check(
            name=f"tokenizer {config.data.tokenizer}",
            status="ok" if version else "missing",
            found=f"{needed} {version}" if version else f"{needed} is not installed",
            note="" if version else f"pip install {needed}",
        )
    for split in ("train", "valid"):
        prefix = getattr(config.data, split)
        absent = [file for ending in (".bin", ".idx") if not Path(file := prefix + ending).exists()]
        if prefix:
            yield Check(
                name=f"data.{split}",
                status="missing" if absent else "ok",
                found=f"no {' and no '.join(absent)}" if absent else f"{prefix}.bin and .idx",
                note=f"mhc-megatron data prepare INPUT... --out {prefix}" if absent else "",
            )


def _on_gpu(machine: Machine) -> bool:
    return machine.torch is not None and bool(machine.torch.capabilities)
