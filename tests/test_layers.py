"""Which part may know which: imports, environment variables, and Megatron left as it is.

Read from the sources' syntax trees, so that a violation fails before anything is run.
"""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]
_MAPPED = ("kernels", "pipeline", "launch")

# All that these may import besides the standard library and their own folder.
_ALLOWED: dict[str, set[str]] = {
    "mhc_megatron.kernels": {"torch", "triton"},
    "mhc_megatron.pipeline": {"numpy", "torch"},
}
_MAY_IMPORT_MEGATRON = (
    "mhc_megatron.megatron",
    "mhc_megatron.data",
    "mhc_megatron.training",
    "mhc_megatron.convert",
    "mhc_megatron.pretrain",
)
_MAY_IMPORT_THE_TRAINING_LOOP = "mhc_megatron.pretrain"
_MAY_READ_ENVIRONMENT = ("mhc_megatron.launch", "mhc_megatron.megatron.compat")

# Import without torch and megatron-core: configuration, the command line, the launcher.
_PURE = (
    "mhc_megatron.config",
    "mhc_megatron.errors",
    "mhc_megatron.refusals",
    "mhc_megatron.training.config",
    "mhc_megatron.training.layout",
    "mhc_megatron.training.overrides",
    "mhc_megatron.convert.cli",
    "mhc_megatron.pretrain.cli",
    "mhc_megatron.pretrain.layout",
    "mhc_megatron.pretrain.options",
    "mhc_megatron.pretrain.rejected",
    "mhc_megatron.launch.checks",
    "mhc_megatron.launch.cli",
    "mhc_megatron.launch.doctor",
    "mhc_megatron.launch.environment",
    "mhc_megatron.launch.floors",
    "mhc_megatron.launch.gpus",
    "mhc_megatron.launch.judge_nodes",
    "mhc_megatron.launch.local",
    "mhc_megatron.launch.machine",
    "mhc_megatron.launch.needs",
    "mhc_megatron.launch.plan",
    "mhc_megatron.launch.preflight",
    "mhc_megatron.launch.simulate",
    "mhc_megatron.launch.simulate_inputs",
    "mhc_megatron.launch.slurm.cluster",
    "mhc_megatron.launch.slurm.job",
    "mhc_megatron.launch.slurm.jobs",
    "mhc_megatron.launch.slurm.left_out",
    "mhc_megatron.launch.slurm.mounts",
    "mhc_megatron.launch.slurm.placement",
    "mhc_megatron.launch.slurm.script",
    "mhc_megatron.launch.slurm.submit",
    "mhc_megatron.launch.slurm.variables",
    "mhc_megatron.training.stop",
)


def _modules() -> dict[str, ast.Module]:
    """Every module of the package by its installed name."""
    found = {}
    for folder in ("mhc_megatron", *_MAPPED):
        for path in sorted((_ROOT / folder).rglob("*.py")):
            parts = path.relative_to(_ROOT).with_suffix("").parts
            if folder in _MAPPED:
                parts = ("mhc_megatron", *parts)
            if parts[-1] == "__init__":
                parts = parts[:-1]
            found[".".join(parts)] = ast.parse(path.read_text(), filename=str(path))
    return found


MODULES = _modules()


def _below(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _imports(nodes: Iterable[ast.AST]) -> Iterator[tuple[int, str]]:
    """(line, module) of every import among ``nodes``; ``from a import b`` counts as ``a.b``."""
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def _run_on_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Everything outside the bodies of functions."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from _run_on_import(node)


def _relative_imports(tree: ast.Module) -> list[str]:
    return [
        f"line {node.lineno}: relative import"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]


def _foreign_imports(name: str, tree: ast.Module) -> list[str]:
    problems = []
    for line, imported in _imports(ast.walk(tree)):
        top = imported.partition(".")[0]
        if top in _MAPPED:
            problems.append(f"line {line}: {imported}, a second copy of mhc_megatron.{imported}")
        if _below(imported, "megatron.legacy") or (
            _below(imported, "megatron.training")
            and not _below(name, _MAY_IMPORT_THE_TRAINING_LOOP)
        ):
            problems.append(f"line {line}: {imported} is not part of megatron-core")
        if top == "megatron" and not _below(name, *_MAY_IMPORT_MEGATRON):
            problems.append(f"line {line}: {imported} outside the folders for megatron-core")
        for prefix, allowed in _ALLOWED.items():
            if (
                _below(name, prefix)
                and not _below(imported, prefix)
                and top not in sys.stdlib_module_names | allowed
            ):
                problems.append(f"line {line}: {prefix} may not import {imported}")
    if _below(name, "mhc_megatron.launch"):
        for line, imported in _imports(_run_on_import(tree)):
            if _below(imported, "mhc_megatron.megatron"):
                problems.append(f"line {line}: launch imports {imported} at module level")
    return problems


def _environment_reads(name: str, tree: ast.Module) -> list[str]:
    if _below(name, *_MAY_READ_ENVIRONMENT):
        return []
    return [
        f"line {node.lineno}: os.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in ("environ", "environb", "getenv", "getenvb", "putenv")
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
    ]


def _root(node: ast.expr) -> str | None:
    """The variable that an expression such as ``a.b[0].c`` starts from."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _targets(node: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.Assign | ast.Delete):
        pending = list(node.targets)
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        pending = [node.target]
    else:
        return
    while pending:
        target = pending.pop()
        if isinstance(target, ast.Tuple | ast.List):
            pending += target.elts
        else:
            yield target


def _patches(tree: ast.Module) -> list[str]:
    """Assignments to what was imported from megatron-core: its modules, classes, functions."""
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if _below(alias.name, "megatron"):
                    imported.add(alias.asname or "megatron")
        elif isinstance(node, ast.ImportFrom) and _below(node.module or "", "megatron"):
            imported.update(alias.asname or alias.name for alias in node.names)
    problems = []
    for node in ast.walk(tree):
        for target in _targets(node):
            if isinstance(target, ast.Attribute | ast.Subscript) and _root(target) in imported:
                problems.append(f"line {node.lineno}: {ast.unparse(target)} is set")
        if isinstance(node, ast.Call) and node.args:
            function = ast.unparse(node.func)
            if function.rpartition(".")[2] in ("setattr", "delattr", "patch", "object"):
                target = node.args[0]
                quoted = isinstance(target, ast.Constant) and str(target.value)
                if _root(target) in imported or (quoted and _below(quoted, "megatron")):
                    problems.append(f"line {node.lineno}: {function} on {ast.unparse(target)}")
    return problems


def test_all_folders_are_looked_at() -> None:
    assert {"mhc_megatron.config", "mhc_megatron.launch.cli"} <= MODULES.keys()
    assert all(f"mhc_megatron.{folder}" in MODULES for folder in _MAPPED)
    assert set(_PURE) <= MODULES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name: str) -> None:
    tree = MODULES[name]
    assert _relative_imports(tree) + _foreign_imports(name, tree) == []


@pytest.mark.parametrize("name", MODULES)
def test_environment_variables_are_read_at_the_edge(name: str) -> None:
    assert _environment_reads(name, MODULES[name]) == []


@pytest.mark.parametrize("name", MODULES)
def test_megatron_is_not_patched(name: str) -> None:
    assert _patches(MODULES[name]) == []


def test_pure_modules_import_without_torch_and_megatron() -> None:
    code = (
        "import importlib, sys\n"
        "sys.modules.update(torch=None, megatron=None, triton=None, numpy=None)\n"
        f"for name in {_PURE}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "source", "problem"),
    [
        ("mhc_megatron.x", "from . import y", "relative"),
        ("mhc_megatron.x", "import megatron.core", "outside the folders"),
        ("mhc_megatron.data.x", "from megatron import training", "not part of megatron-core"),
        ("mhc_megatron.data.x", "from megatron.training import y", "not part of megatron-core"),
        ("mhc_megatron.pretrain.x", "import megatron.legacy", "not part of megatron-core"),
        ("mhc_megatron.x", "def f():\n  import kernels.y", "a second copy"),
        ("mhc_megatron.kernels.x", "import mhc_megatron.config", "may not import"),
        ("mhc_megatron.kernels.x", "import numpy", "may not import"),
        ("mhc_megatron.pipeline.x", "import mhc_megatron.kernels.y", "may not import"),
        (
            "mhc_megatron.launch.x",
            "if True:\n  from mhc_megatron.megatron import compat",
            "at module level",
        ),
    ],
)
def test_a_wrong_import_is_found(name: str, source: str, problem: str) -> None:
    tree = ast.parse(source)
    problems = _relative_imports(tree) or _foreign_imports(name, tree)
    assert any(problem in found for found in problems)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("mhc_megatron.kernels.x", "import math, torch, triton, mhc_megatron.kernels.reference"),
        ("mhc_megatron.megatron.x", "from megatron.core import parallel_state"),
        ("mhc_megatron.pretrain.x", "from megatron.training import pretrain"),
        ("mhc_megatron.launch.x", "def f():\n  import mhc_megatron.megatron.compat"),
    ],
)
def test_a_right_import_is_not_found(name: str, source: str) -> None:
    assert _foreign_imports(name, ast.parse(source)) == []


@pytest.mark.parametrize(
    "statement",
    [
        "parallel_state.x = 1",
        "parallel_state.x += 1",
        "parallel_state.table['x'] = 1",
        "a, parallel_state.x = 1, 2",
        "del parallel_state.x",
        "megatron.core.x: int = 1",
        "setattr(parallel_state, 'x', 1)",
        "monkeypatch.setattr(megatron.core.utils, 'x', 1)",
        "mock.patch.object(parallel_state, 'x')",
        "mock.patch('megatron.core.parallel_state.x')",
    ],
)
def test_a_patch_is_found(statement: str) -> None:
    imports = "import megatron.core.utils\nfrom megatron.core import parallel_state\n"
    assert len(_patches(ast.parse(imports + statement))) == 1


def test_own_objects_may_be_changed() -> None:
    source = "from megatron.core import GPTModel\nmodel = GPTModel()\nmodel.x = 1\nother.y = 2"
    assert _patches(ast.parse(source)) == []


def test_an_environment_read_is_found() -> None:
    tree = ast.parse("import os\nx = os.environ['A'] + os.getenv('B')")
    assert len(_environment_reads("mhc_megatron.data.x", tree)) == 2
    assert _environment_reads("mhc_megatron.launch.x", tree) == []
