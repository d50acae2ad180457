"""Judges a machine: one check per package and device, each with what its absence costs. Pure."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import Version

from mhc_megatron.launch.gpus import POWER_CAP, Gpu, Gpus
from mhc_megatron.launch.machine import Machine, Torch

Status = Literal["ok", "missing", "warn"]

DATA_HELPER = "core's data helper"

_GIB = 2**30
_LITTLE_DISK = 5 * _GIB  # less than two checkpoints of a 100M-parameter model

# What has kernels of its own, and the Triton that they are written for.
HOPPER, HOPPER_TRITON = (9, 0), Version("3.6")

# What does not work without a package; transformer-engine's part depends on megatron-core.
_COSTS = {
    "torch": "nothing runs",
    "megatron-core": "no training and no data; the layer itself works",
    "numpy": "nothing runs",
    "packaging": "nothing runs",
    "psutil": "no checkpoints: megatron-core hangs when it saves one",
    "matplotlib": "no reports",
    "tensorboard": "no TensorBoard scalars",
    "tqdm": "no progress bar",
    "triton": "no fused kernels, and no megatron-core 0.19",
    "nvidia-ml-py": "the doctor cannot look at the GPUs",
    "transformer-engine": (
        "no transformer_impl=transformer_engine, no FP8, no context parallelism; with "
        "megatron-core below 0.17 no MoE and no multi-latent attention"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One row of the doctor's table.

    Attributes:
        status: ``ok``; ``missing``; or ``warn``: it is there, but not as it should be.
        found: what this machine has.
        note: what that means and what to do about it.
    """

    name: str
    status: Status
    found: str
    note: str = ""


def supported() -> dict[str, Requirement]:
    """What this project declares for each package that a check knows, by name.

    The metadata of the installed project is the only place where the supported versions stand.
    """
    declared = map(Requirement, metadata.requires("mhc-megatron") or ())
    return {_normal(found.name): found for found in declared if _normal(found.name) in _COSTS}


def pip_install(requirement: Requirement) -> str:
    """The command that installs a supported version."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f'pip install "{requirement.name}{extras}{requirement.specifier}"'


def collect(machine: Machine) -> list[Check]:
    """Every check of the machine, software first; no recipe involved."""
    wanted = supported()
    return [
        _python(machine),
        _torch(machine, wanted["torch"]),
        *_core(machine, wanted["megatron-core"]),
        *(
            package(machine, requirement)
            for name, requirement in wanted.items()
            if name not in ("torch", "megatron-core")
        ),
        *_extension(machine),
        *_hopper_kernels(machine),
        _apex(machine),
        *_communication(machine.torch),
        *_gpus(machine.gpus, machine.torch),
        _slurm(machine),
        Check(name="CPU cores", status="ok", found=str(machine.cores)),
        _disk(machine),
    ]


def package(machine: Machine, requirement: Requirement) -> Check:
    """Whether a distribution is there, imports, and has a supported version."""
    name = _normal(requirement.name)
    version = machine.versions.get(name)
    if version is None:
        return _missing(name, "not installed", requirement)
    problem = machine.import_problems.get(name)
    if problem:
        return _missing(name, f"{version}, which does not import: {problem}", requirement)
    return Check(name=name, **_judged(version, requirement))  # type: ignore[arg-type]


def _missing(name: str, found: str, requirement: Requirement) -> Check:
    return Check(
        name=name,
        status="missing",
        found=found,
        note=f"{_COSTS[name]}; {pip_install(requirement)}",
    )


def _judged(version: str, requirement: Requirement) -> dict[str, str]:
    """Status, found and note of an installed version."""
    specifier = requirement.specifier
    if specifier.contains(version, prereleases=True):
        return {"status": "ok", "found": version, "note": ""}
    release = Version(version)
    lower = [Version(part.version) for part in specifier if part.operator == ">="]
    relation = "older" if any(release < bound for bound in lower) else "newer"
    return {
        "status": "warn",
        "found": version,
        "note": f"{relation} than the supported {specifier}; {pip_install(requirement)}",
    }


def _python(machine: Machine) -> Check:
    found = ".".join(map(str, machine.python))
    wanted = metadata.metadata("mhc-megatron")["Requires-Python"]
    if Requirement(f"python{wanted}").specifier.contains(found):
        return Check(name="python", status="ok", found=found)
    return Check(name="python", status="warn", found=found, note=f"outside the supported {wanted}")


def _torch(machine: Machine, requirement: Requirement) -> Check:
    torch = machine.torch
    if torch is None:
        problem = machine.torch_problem
        found = f"does not import: {problem}" if problem else "not installed"
        return _missing("torch", found, requirement)
    judged = _judged(torch.version, requirement)
    judged["found"] += f", CUDA {torch.cuda}" if torch.cuda else ", CPU build"
    return Check(name="torch", **judged)  # type: ignore[arg-type]


def _core(machine: Machine, requirement: Requirement) -> Iterator[Check]:
    core = machine.core
    if core is None:
        yield _missing("megatron-core", "not installed", requirement)
        return
    yield Check(name="megatron-core", **_judged(core.version, requirement))  # type: ignore[arg-type]
    if not core.helper:
        yield Check(
            name=DATA_HELPER,
            status="missing",
            found="not compiled for this Python",
            note="no training data can be read; pip install --force-reinstall --no-deps "
            f"megatron-core=={core.version}",
        )


def _extension(machine: Machine) -> Iterator[Check]:
    if machine.extension is None:
        return
    found, remedy = machine.extension
    yield Check(
        name="launch extension",
        status="missing" if remedy else "ok",
        found=found,
        note=remedy and f"the kernels are launched by Python, which costs the host more; {remedy}",
    )


def _hopper_kernels(machine: Machine) -> Iterator[Check]:
    """Those of ``mhc_megatron.kernels.triton.hopper``, where there is a GPU that has them."""
    version = machine.versions.get("triton")
    if version is None or machine.torch is None or HOPPER not in machine.torch.capabilities:
        return
    old = Version(version) < HOPPER_TRITON
    yield Check(
        name="Hopper kernels",
        status="warn" if old else "ok",
        found=f"triton {version}",
        note="pre and post_pre are slower without them; pip install 'triton>="
        f"{HOPPER_TRITON}', with a torch that goes with it"
        if old
        else "",
    )


def _apex(machine: Machine) -> Check:
    version = machine.versions.get("apex")
    problem = machine.import_problems.get("apex")
    if version and not problem:
        return Check(name="apex", status="ok", found=version)
    return Check(
        name="apex",
        status="missing",
        found=f"{version}, without its CUDA extensions" if version else "not installed",
        note="costs only speed, and nothing beside Transformer Engine; build it from source "
        "(pip's package of that name is another project)",
    )


def _communication(torch: Torch | None) -> Iterator[Check]:
    if torch is None:
        return
    if torch.nccl:
        yield Check(name="NCCL", status="ok", found=torch.nccl)
    else:
        yield Check(
            name="NCCL",
            status="missing",
            found="not in this torch",
            note="no training on GPUs; it comes with torch's CUDA builds",
        )
    if torch.gloo:
        yield Check(name="gloo", status="ok", found="in torch")
    else:
        yield Check(
            name="gloo",
            status="missing",
            found="not in this torch",
            note='no training without a GPU; pip install "torch"',
        )


def _gpus(gpus: Gpus, torch: Torch | None) -> Iterator[Check]:
    if gpus.problem:
        seen = len(torch.capabilities) if torch else 0
        yield Check(
            name="GPUs",
            status="warn" if seen else "missing",
            found=f"{seen} in torch" if seen else "none seen",
            note=f"{gpus.problem}; " + ("their state is unknown" if seen else "runs use the CPU"),
        )
    elif not gpus.devices:
        yield Check(
            name="GPUs",
            status="missing",
            found=f"none, driver {gpus.driver}",
            note="runs use the CPU",
        )
    else:
        yield _driver(gpus, torch)
        for index, gpu in enumerate(gpus.devices):
            yield _gpu(f"GPU {index}", gpu, alone=len(gpus.devices) == 1)


def _driver(gpus: Gpus, torch: Torch | None) -> Check:
    if torch is None or torch.capabilities:
        return Check(name="GPU driver", status="ok", found=gpus.driver)
    if torch.cuda is None:
        note = "torch is a CPU build, so runs use the CPU; install torch's CUDA build"
    else:
        note = (
            f"torch, built for CUDA {torch.cuda}, cannot use the GPUs with it, so runs use the "
            "CPU; install a newer driver, or a torch built for an older CUDA"
        )
    return Check(name="GPU driver", status="warn", found=gpus.driver, note=note)


def _gpu(name: str, gpu: Gpu, *, alone: bool) -> Check:
    found = [gpu.name]
    troubles = []
    if gpu.memory_bytes is not None:
        found.append(f"{gpu.memory_bytes / _GIB:.0f} GiB")
    if gpu.links:
        found.append(f"NVLinks {gpu.links_up}/{gpu.links} up")
        if gpu.links_up < gpu.links and not alone:
            troubles.append(f"{gpu.links - gpu.links_up} NVLinks are down: slow communication")
    if gpu.ecc_errors is not None:
        found.append(f"{gpu.ecc_errors} ECC errors")
        if gpu.ecc_errors:
            troubles.append("uncorrected memory errors: results may be wrong; reset the GPU")
    if gpu.clock_mhz is not None:
        found.append(f"{gpu.clock_mhz} of {gpu.max_clock_mhz} MHz")
    if gpu.throttling:
        found.append("held down by " + " and ".join(gpu.throttling))
        # The cap is normal under load; the rest is cooling or supply.
        if set(gpu.throttling) - {POWER_CAP}:
            troubles.append("slowed down: check its cooling and power supply")
    return Check(
        name=name,
        status="warn" if troubles else "ok",
        found=", ".join(found),
        note="; ".join(troubles),
    )


def _slurm(machine: Machine) -> Check:
    if machine.slurm is not None:
        return Check(name="SLURM", status="ok", found=machine.slurm)
    return Check(
        name="SLURM",
        status="missing",
        found="no sbatch and sinfo in PATH",
        note="no cluster jobs from here; runs on one machine need none",
    )


def _disk(machine: Machine) -> Check:
    little = machine.disk_free < _LITTLE_DISK
    return Check(
        name="free disk",
        status="warn" if little else "ok",
        found=f"{machine.disk_free / _GIB:.1f} GiB",
        note="checkpoints may not fit in the current directory" if little else "",
    )


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
