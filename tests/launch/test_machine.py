"""Reading what is installed, from made-up folders and programs."""

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mhc_megatron.launch import machine


def core_in(folder: Path, *, pre_release: str = "", helper: bool = True) -> Path:
    core = folder / "megatron" / "core"
    (core / "datasets").mkdir(parents=True)
    (core / "__init__.py").write_text("raise AssertionError('imported')")
    (core / "package_info.py").write_text(
        "MAJOR = 0\nMINOR = 19\nPATCH = 2\n"
        f"PRE_RELEASE = {pre_release!r}\n"
        "VERSION = (MAJOR, MINOR)\nraise AssertionError('executed')\n"
    )
    if helper:
        (core / "datasets" / f"helpers_cpp{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    return folder


@pytest.mark.parametrize(
    ("pre_release", "helper", "expected"),
    [
        ("", True, machine.Core(version="0.19.2")),
        ("rc1", False, machine.Core(version="0.19.2rc1", helper=False)),
    ],
)
def test_core_is_read_and_not_imported(
    tmp_path: Path, pre_release: str, helper: bool, expected: machine.Core
) -> None:
    core_in(tmp_path, pre_release=pre_release, helper=helper)
    spec = importlib.util.spec_from_file_location(
        "megatron.core", tmp_path / "megatron" / "core" / "__init__.py"
    )
    assert machine._read_core(spec) == expected


def test_core_is_found_where_the_import_would_find_it(tmp_path: Path) -> None:
    code = (
        "from mhc_megatron.launch import machine; "
        "print(machine._read_core(machine._find_core()).version)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(core_in(tmp_path)), "PATH": ""},
    )
    assert done.stdout == "0.19.2\n", done.stderr


def test_no_core() -> None:
    assert machine._read_core(None) is None


def test_why_a_module_does_not_import() -> None:
    assert machine._import_problem("json") == ""
    assert machine._import_problem("no_such") == "ModuleNotFoundError: No module named 'no_such'"


def test_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine._read_slurm() is None
    for name in ("sinfo", "sbatch"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\necho slurm 24.05.1\n")
        program.chmod(0o755)
    assert machine._read_slurm() == "24.05.1"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("raise ModuleNotFoundError('No module named torch', name='torch')", (None, "")),
        ("raise ModuleNotFoundError('No module named x', name='x')", (None, "No module named x")),
        ("raise OSError('libcudart.so: cannot open')", (None, "libcudart.so: cannot open")),
    ],
    ids=["absent", "incomplete", "broken"],
)
def test_a_torch_that_does_not_import(
    tmp_path: Path, source: str, expected: tuple[None, str]
) -> None:
    (tmp_path / "torch.py").write_text(source)
    code = "from mhc_megatron.launch import machine; print(machine._read_torch())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert done.stdout == f"{expected}\n", done.stderr
