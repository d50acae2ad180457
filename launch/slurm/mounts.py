"""What a container must see of the host: the run, its data, and the code where it is the host's."""

import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mhc_megatron.errors import UserError

if TYPE_CHECKING:
    from mhc_megatron.training.config import TrainConfig

# An image's own; the host's would hide its libraries.
_SYSTEM = ("/", "/usr", "/usr/local")


def container_mounts(given: Sequence[str], needed: Iterable[str]) -> tuple[str, ...]:
    """``SRC:DST`` of all that a container sees: what was given, and needed folders in their place.

    Args:
        given: ``SRC:DST`` or ``SRC:DST:FLAGS``; they replace a needed folder with the same DST.
        needed: absolute paths of the host; one inside another is seen with it.

    Raises:
        UserError: a path that such a text cannot hold.
    """
    places = {text.split(":")[1] for text in given if ":" in text}
    mounts = list(given)
    outer = ""
    for path in sorted(set(needed)):
        if ":" in path or "," in path:
            raise UserError(
                f"{path!r} cannot be mounted into a container; rename it without : or ,"
            )
        if outer and path.startswith(f"{outer}/"):
            continue
        outer = path
        if path not in places:
            mounts.append(f"{path}:{path}")
    return tuple(mounts)


def run_folders(configs: Sequence["TrainConfig"], out: str, *, in_tasks: bool) -> list[str]:
    """The folders that a run reads and writes.

    Args:
        configs: of the run, or of all tasks of an array.
        out: the run's folder, absolute.
        in_tasks: the runs are in folders of their own below it.

    Raises:
        UserError: relative paths, which a container resolves by its own working directory.
    """
    folders = [out]
    for config in configs:
        data = config.data
        named = {"data.train": data.train, "data.valid": data.valid}
        kind, _, place = data.tokenizer.partition(":")
        if kind == "hf" and place.startswith("/"):
            folders.append(place)
        for name, prefix in named.items():
            if prefix and not os.path.isabs(prefix):
                raise UserError(
                    f"{name}={prefix!r} must be absolute with --container, whose working directory "
                    "is another"
                )
            folders += [os.path.dirname(prefix)] if prefix else []
        if not data.train and not in_tasks:
            # The embedded corpus is made beside the run.
            folders.append(os.path.dirname(out))
    for folder in folders:
        if folder in _SYSTEM:
            raise UserError(
                f"{folder!r} cannot be mounted into a container; choose an --out or data folder "
                "further down"
            )
    return folders


def code_folders(recipe: str) -> list[str]:
    """This Python environment, this package and the recipe's, where an image may lack them.

    Args:
        recipe: a name, or ``package.module:function``.
    """
    found = [sys.prefix, sys.base_prefix]
    modules = ["mhc_megatron"]
    if ":" in recipe:
        modules.append(recipe.partition(":")[0].partition(".")[0])
    for module in modules:
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None, module
        origin = Path(spec.origin).absolute()
        found.append(str(origin.parents[1] if origin.name == "__init__.py" else origin.parent))
    return [folder for folder in found if folder not in _SYSTEM]
