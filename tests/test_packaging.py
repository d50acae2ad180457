"""What an installation contains: the mapped folders inside one package, and nothing generic.

Everything is built from a copy of the sources without a network: ``--no-build-isolation``.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

_ROOT = Path(__file__).resolve().parents[1]
_MAPPED = ("kernels", "pipeline", "launch")
_SOURCES = ("mhc_megatron", *_MAPPED)
_PROJECT_FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
_OFFLINE = ("--no-deps", "--no-index", "--no-build-isolation")

# Imports every module of the installed package and says where they came from. Only core >= 0.19 has
# the package that one of them is written for.
_IMPORT_ALL = """\
import importlib, importlib.util, json, pkgutil, sys
import mhc_megatron
names = [found.name for found in pkgutil.walk_packages(mhc_megatron.__path__, "mhc_megatron.")]
loop = importlib.util.find_spec("megatron.training")
for name in names:
    if loop or name not in ("mhc_megatron.pretrain.gpt", "mhc_megatron.pretrain.stages"):
        importlib.import_module(name)
generic = ("kernels", "pipeline", "launch")
print(json.dumps({
    "origin": mhc_megatron.__file__,
    "names": names,
    "loaded": [name for name in generic if name in sys.modules],
    "found": [name for name in generic if importlib.util.find_spec(name)],
}))
"""


def _run(*command: str, cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged: builds write beside the sources."""
    folder = tmp_path_factory.mktemp("project")
    for name in _PROJECT_FILES:
        shutil.copy(_ROOT / name, folder)
    for name in _SOURCES:
        shutil.copytree(
            _ROOT / name,
            folder / name,
            ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "*.so"),
        )
    return folder


@pytest.fixture(scope="module")
def wheel(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _run(*_PIP, "wheel", *_OFFLINE, "--wheel-dir", str(folder), ".", cwd=project)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    _run(*_PIP, "install", *_OFFLINE, "--target", str(folder), str(wheel), cwd=folder)
    return folder


def _sources() -> Iterator[str]:
    """Every file of the packages, by its installed path; an extension is compiled where it is."""
    for name in _SOURCES:
        for path in (_ROOT / name).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so":
                relative = path.relative_to(_ROOT)
                yield str(relative if name == "mhc_megatron" else "mhc_megatron" / relative)


def test_the_wheel_holds_the_sources_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    metadata = [name for name in names if ".dist-info/" in name]
    assert sorted(set(names) - set(metadata)) == sorted(_sources())
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)


def test_nothing_generic_is_installed(installed: Path) -> None:
    entries = {entry.name for entry in installed.iterdir()} - {"bin"}
    assert {name for name in entries if not name.endswith(".dist-info")} == {"mhc_megatron"}
    assert len(entries) == 2


def test_the_console_command_runs_from_the_wheel(wheel: Path, installed: Path) -> None:
    command = str(installed / "bin" / "mhc-megatron")
    shown = _run(command, "--version", cwd=installed, PYTHONPATH=str(installed))
    assert shown == f"mhc-megatron {wheel.name.split('-')[1]}\n"


def test_all_modules_import_as_parts_of_the_package(installed: Path) -> None:
    shown = _run(
        sys.executable, "-W", "ignore", "-c", _IMPORT_ALL, cwd=installed, PYTHONPATH=str(installed)
    )
    result = json.loads(shown.splitlines()[-1])
    assert Path(result["origin"]).is_relative_to(installed)
    assert {f"mhc_megatron.{folder}" for folder in _MAPPED} < set(result["names"])
    assert (result["loaded"], result["found"]) == ([], [])


def test_an_editable_installation_needs_no_network(project: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    _run(sys.executable, "-m", "venv", "--without-pip", str(environment), cwd=tmp_path)
    python = environment / "bin" / "python"
    site = Path(
        _run(
            str(python),
            "-c",
            "import sysconfig; print(sysconfig.get_path('purelib'))",
            cwd=tmp_path,
        ).strip()
    )
    # Setuptools comes from the environment of the tests; its .pth files do not count twice.
    (site / "tests_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _run(str(python), "-m", "pip", "install", *_OFFLINE, "--editable", ".", cwd=project)
    shown = _run(
        str(python),
        "-c",
        "import mhc_megatron.config as a, mhc_megatron.launch.cli as b; "
        "print(a.__file__, b.__file__)",
        cwd=tmp_path,
    )
    assert shown.split() == [
        str(project / "mhc_megatron" / "config.py"),
        str(project / "launch" / "cli.py"),
    ]
    command = str(environment / "bin" / "mhc-megatron")
    assert _run(command, "--version", cwd=tmp_path).startswith("mhc-megatron ")


def test_every_dependency_is_pinned(installed: Path) -> None:
    """``make`` installs the same versions everywhere: no requirement is left to the index."""
    (distribution,) = metadata.distributions(path=[str(installed)])
    wanted = map(Requirement, distribution.requires or [])
    optional = re.compile(r"extra == .(te|slurm|docs).")
    names = {found.name for found in wanted if not optional.search(str(found.marker))}
    lines = (_ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line.partition("#")[0]) for line in lines if "==" in line]
    assert {"torch", "pytest", "triton"} <= names
    assert {_normal(name) for name in names} <= {_normal(pin.name) for pin in pins}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
