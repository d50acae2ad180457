"""Megatron's training loop with other functions in the place of some that it fetches by name.

``train`` and ``evaluate`` of ``megatron.training.training`` fetch their schedule by a name of that
module, and take no other. So the module's source is executed a second time, as a module of ours, in
which the name is bound to another function. Megatron's module, which everybody else imports, stays
as it is; both share the arguments, timers and writers of ``megatron.training.global_vars``.
"""

import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

from mhc_megatron.errors import UserError
from mhc_megatron.megatron.compat import typing_override

_MODULE = "megatron.training.training"
_STARTUP = "_STARTUP_TIMESTAMPS"


def loop_with(**functions: Callable[[Callable[..., Any]], Callable[..., Any]]) -> ModuleType:
    """A module like ``megatron.training.training`` with some of its functions replaced.

    Args:
        functions: by name in that module, what makes the replacement of Megatron's function.

    Raises:
        UserError: this Megatron's loop has no function of such a name.
    """
    from megatron.training import training as megatrons

    spec = importlib.util.find_spec(_MODULE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with typing_override():
        spec.loader.exec_module(module)
    names = vars(module)
    for name, replacement in functions.items():
        if name not in names:
            raise UserError(
                f"{_MODULE} of this Megatron has no {name} to replace; install megatron-core 0.19, "
                "or use --mhc-schedule=megatron"
            )
        names[name] = replacement(names[name])
    # When this process started, as the script said.
    names[_STARTUP] = vars(megatrons)[_STARTUP]
    return module
