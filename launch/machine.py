"""What is installed and what this machine has: read once, judged elsewhere."""

import ast
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path

from mhc_megatron.launch.gpus import Gpus, read_gpus

# Distributions that the checks ask about, besides torch and megatron-core.
_DISTRIBUTIONS = (
    "numpy",
    "packaging",
    "psutil",
    "matplotlib",
    "tensorboard",
    "tqdm",
    "triton",
    "nvidia-ml-py",
    "transformer-engine",
    "apex",
    "tiktoken",
    "transformers",
)
# Compiled extensions often are installed and yet do not import; seconds until one is given up.
_IMPORT_TIMEOUT = 120


@dataclass(frozen=True, kw_only=True)
class Torch:
    """The torch that this Python imports.

    Attributes:
        cuda: CUDA release it was built for, None for a CPU build.
        capabilities: compute capability (major, minor) of each GPU that it can use.
        nccl: NCCL's version, None without.
    """

    version: str
    cuda: str | None = None
    capabilities: tuple[tuple[int, int], ...] = ()
    nccl: str | None = None
    gloo: bool = True


@dataclass(frozen=True, kw_only=True)
class Core:
    """The megatron-core that this Python imports.

    Attributes:
        helper: its dataset helper is compiled for this Python.
    """

    version: str
    helper: bool = True


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Everything that the checks look at.

    Attributes:
        python: (major, minor, micro).
        versions: installed distributions, by normalised name.
        import_problems: of modules that are installed and do not import: the reason.
        torch, core: None when not installed.
        torch_problem: why an installed torch does not import.
        extension: what the extension that launches kernels was built for, or why it is not
            there, and then the command that builds it; None without torch.
        slurm: what ``sinfo --version`` says, None without SLURM.
        disk_free: bytes, in the current directory.
    """

    python: tuple[int, int, int]
    versions: Mapping[str, str] = field(default_factory=dict)
    import_problems: Mapping[str, str] = field(default_factory=dict)
    torch: Torch | None = None
    torch_problem: str = ""
    extension: tuple[str, str] | None = None
    core: Core | None = None
    gpus: Gpus = field(default_factory=Gpus)
    slurm: str | None = None
    cores: int = 1
    disk_free: int = 0


def read_machine() -> Machine:
    """Look around; imports torch, and tries Transformer Engine in a process of its own."""
    torch, torch_problem = _read_torch()
    versions = {name: found for name in _DISTRIBUTIONS if (found := _version(name)) is not None}
    problems = {}
    for name, module in (("transformer-engine", "transformer_engine.pytorch"), ("apex", "amp_C")):
        if name in versions and (reason := _import_problem(module)):
            problems[name] = reason
    return Machine(
        python=sys.version_info[:3],
        versions=versions,
        import_problems=problems,
        torch=torch,
        torch_problem=torch_problem,
        extension=None if torch is None else _read_extension(),
        core=_read_core(_find_core()),
        gpus=read_gpus(load_nvml()),
        slurm=_read_slurm(),
        cores=os.cpu_count() or 1,
        disk_free=shutil.disk_usage(Path.cwd()).free,
    )


def _read_extension() -> tuple[str, str]:
    # Imports torch.
    from mhc_megatron.kernels.native.extension import BUILD, availability

    available, found = availability()
    return found, "" if available else BUILD


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _read_torch() -> tuple[Torch | None, str]:
    try:
        import torch
    except ModuleNotFoundError as error:
        return None, "" if error.name == "torch" else _last_line(str(error))
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        return None, _last_line(str(error))
    distributed = torch.distributed
    usable = distributed.is_available()
    with_nccl = usable and distributed.is_nccl_available()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return (
        Torch(
            version=torch.__version__,
            cuda=torch.version.cuda,
            capabilities=tuple(torch.cuda.get_device_capability(n) for n in range(count)),
            nccl=".".join(map(str, torch.cuda.nccl.version())) if with_nccl else None,
            gloo=usable and distributed.is_gloo_available(),
        ),
        "",
    )


def _find_core() -> ModuleSpec | None:
    try:
        return importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        return None


def _read_core(spec: ModuleSpec | None) -> Core | None:
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    helper = folder / "datasets" / f"helpers_cpp{sysconfig.get_config_var('EXT_SUFFIX')}"
    return Core(version=_core_version(folder / "package_info.py"), helper=helper.exists())


def _core_version(package_info: Path) -> str:
    """The version that an import would find, which need not be the one that pip knows.

    Importing megatron-core takes seconds and prints warnings, and its ``package_info`` of 0.19
    calls git, so the constants are read from the source.
    """
    constants = {}
    for node in ast.parse(package_info.read_text()).body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Constant)
        ):
            constants[node.targets[0].id] = str(node.value.value)
    numbers = [constants[name] for name in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(numbers) + constants["PRE_RELEASE"]


def load_nvml() -> object | None:
    """nvidia-ml-py's module; None where it is not installed."""
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return None


def _import_problem(module: str) -> str:
    """Why ``module`` does not import, empty if it does."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            timeout=_IMPORT_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return f"importing it takes longer than {_IMPORT_TIMEOUT} s"
    return _last_line(done.stderr) or "it crashes" if done.returncode else ""


def _read_slurm() -> str | None:
    if shutil.which("sbatch") is None or shutil.which("sinfo") is None:
        return None
    done = subprocess.run(["sinfo", "--version"], capture_output=True, text=True, timeout=30)
    found = re.search(r"\d+(\.\d+)+", done.stdout)
    return found.group() if found else "unknown version"


def _last_line(text: str) -> str:
    return "".join(text.strip().splitlines()[-1:])
