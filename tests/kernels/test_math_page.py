"""docs/math.md has a section for every function and names only tests that exist."""

import ast
import re
from pathlib import Path

from mhc_megatron import kernels

FOLDER = Path(__file__).parent
PAGE = (FOLDER.parents[1] / "docs" / "math.md").read_text()


def test_every_function_has_a_section() -> None:
    functions = {name for name in kernels.__all__ if name.islower()}
    operations = PAGE.split("\n## Operations\n")[1].split("\n## ")[0]
    sections = set(re.findall(r"^### (\w+)$", operations, flags=re.MULTILINE))
    assert functions == sections
    assert functions == set(re.findall(r"\]\(#(\w+)\)", PAGE)) - {"initialisation"}


def test_every_named_test_exists() -> None:
    named = set(re.findall(r"`(test_\w+\.py)::(\w+)`", PAGE))
    assert named
    for file, name in named:
        tree = ast.parse((FOLDER / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


def test_every_convention_names_its_test() -> None:
    table = PAGE.split("| Convention |")[1].split("\n\n")[0]
    rows = table.splitlines()[2:]
    assert len(rows) > 10
    assert all("::test_" in row.rstrip("|").rsplit("|", 1)[1] for row in rows)
