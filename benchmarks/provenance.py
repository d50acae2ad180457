"""What every line of a result file says about where its figure comes from."""

import datetime
import importlib.metadata
import json
import subprocess
import uuid
from pathlib import Path
from typing import Any

import torch

from mhc_megatron.megatron.attention import attention_kernels


def provenance(commit: str | None) -> dict[str, Any]:
    """Machine, versions, commit and one identifier for everything measured by this process.

    Args:
        commit: the code measured; None asks git, which must find a clean answer.
    """
    if commit is None:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    return {
        "run": uuid.uuid4().hex[:12],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "megatron_core": _version("megatron-core"),
        "transformer_engine": _version("transformer-engine"),
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def append(folder: Path, line: dict[str, Any], source: dict[str, Any]) -> None:
    """Add a line, with its ``provenance``, to the file of its benchmark.

    Where Transformer Engine computed attention, in this process or by the line's own word, it says
    with which kernels.
    """
    attention = attention_kernels()
    if attention is not None:
        line = {"attention": attention, **line}
    with (folder / f"{line['benchmark']}.jsonl").open("a") as file:
        file.write(json.dumps({**line, **source}) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    import pynvml

    pynvml.nvmlInit()
    return pynvml.nvmlSystemGetDriverVersion()
