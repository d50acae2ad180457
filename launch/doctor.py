"""``mhc-megatron doctor``: what this machine can run, and what is missing for the rest."""

import argparse
import dataclasses
import json
import textwrap
from collections.abc import Sequence

from mhc_megatron.errors import UserError
from mhc_megatron.launch.checks import Check, collect
from mhc_megatron.launch.machine import read_machine
from mhc_megatron.launch.needs import recipe_checks

_WIDTH = 100

_DESCRIPTION = """\
Say what this machine can run, and what is missing for the rest.

Without a recipe everything is listed and the exit status is 0. With one, what that training needs
is checked as well, and the exit status is 1 when something of it is missing.
"""

_EXAMPLES = """\
examples:
  mhc-megatron doctor
  mhc-megatron doctor --recipe stdlib-small
  mhc-megatron doctor --recipe gpt-100m --set dtype=fp16 parallel.data=2
  mhc-megatron doctor --recipe my_package.recipes:big --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mhc-megatron doctor``."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="check what this recipe needs: a name, or module:function",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change fields of the recipe, as for train",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Run a parsed ``mhc-megatron doctor``; 1 when something the recipe needs is missing.

    Raises:
        UserError: no such recipe or field.
    """
    if args.overrides and args.recipe is None:
        raise UserError("--set changes a recipe; name it with --recipe")
    machine = read_machine()
    checks = collect(machine)
    needed: list[Check] = []
    if args.recipe is not None:
        # Recipes are the user's modules, too: what they import is not needed without one.
        from mhc_megatron.training.overrides import apply_overrides
        from mhc_megatron.training.recipes import load_recipe

        config = apply_overrides(load_recipe(args.recipe), args.overrides)
        needed = recipe_checks(config, machine)
    runnable = all(check.status != "missing" for check in needed)
    if args.json:
        print(_to_json(checks, needed, args.recipe, runnable))
    else:
        print(to_table(checks))
        if args.recipe is not None:
            print(f"\n{args.recipe} needs:\n{to_table(needed)}\n")
            print(f"{args.recipe} can run here" if runnable else f"{args.recipe} cannot run here")
    return 0 if runnable else 1


def to_table(checks: Sequence[Check]) -> str:
    """Rows of status, name and what was found; below those that are not ok, what that means."""
    width = max((len(check.name) for check in checks), default=0)
    indent = " " * (len("missing") + width + 4)
    lines = []
    for check in checks:
        row = f"{check.status:<7}  {check.name:<{width}}  {check.found}"
        lines.append(row)
        for part in check.note.split("; "):  # a command to copy stands on a line of its own
            lines += textwrap.wrap(part, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines)


def _to_json(
    checks: Sequence[Check], needed: Sequence[Check], recipe: str | None, runnable: bool
) -> str:
    record = {
        "machine": [dataclasses.asdict(check) for check in checks],
        "recipe": recipe,
        "needs": [dataclasses.asdict(check) for check in needed],
        "runnable": runnable if recipe is not None else None,
    }
    return json.dumps(record, indent=2)
