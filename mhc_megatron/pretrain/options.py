"""``MHCConfig`` as command-line flags and as environment variables. Pure: no torch, no Megatron.

The fields of ``MHCConfig`` are the only schema: ``num_streams`` is ``--mhc-num-streams`` and
``MHC_NUM_STREAMS``; defaults, types and help come from there, and so do the checks.
"""

import argparse
import dataclasses
import inspect
import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.training.layout import ParallelConfig
from mhc_megatron.training.overrides import apply_overrides

# Fields of ParallelConfig: what runs a step's forwards and backwards.
_PIPELINE = ("schedule", "overlap", "messages")
_LOG_TIMING = "log_timing"
_LOG_TIMING_HELP = (
    "Every so many iterations, the hyper-connections' milliseconds in Megatron's log and "
    "TensorBoard; 0 for never."
)


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of the hyper-connections.

    Attributes:
        name: the field of ``MHCConfig`` or, of the pipeline, of ``ParallelConfig``; ``log_timing``.
        default: its default value.
        values: what may be given, for people.
        help: what it means.
    """

    name: str
    default: Any
    values: str
    help: str

    @property
    def flag(self) -> str:
        """On a command line."""
        return "--mhc-" + self.name.replace("_", "-")

    @property
    def dest(self) -> str:
        """In the namespace that a parser returns."""
        return f"mhc_{self.name}"

    @property
    def variable(self) -> str:
        """In the environment."""
        return f"MHC_{self.name.upper()}"


def mhc_options() -> tuple[Option, ...]:
    """An option for every field of ``MHCConfig``, three of the pipeline, and ``log_timing``."""
    log_timing = Option(name=_LOG_TIMING, default=0, values="INT", help=_LOG_TIMING_HELP)
    pipeline = [option for option in _fields_of(ParallelConfig) if option.name in _PIPELINE]
    return (*_fields_of(MHCConfig), *pipeline, log_timing)


def _fields_of(cls: type) -> list[Option]:
    hints, texts = get_type_hints(cls), _attribute_texts(cls)
    return [
        Option(
            name=field.name,
            default=field.default,
            values=_values(hints[field.name]),
            help=texts[field.name],
        )
        for field in dataclasses.fields(cls)
    ]


def add_mhc_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the ``--mhc-*`` flags: Megatron's ``extra_args_provider``.

    Args:
        parser: any parser; Megatron's takes the flags beside its own.

    Returns:
        The same parser. ``mhc_from_args`` reads what it parses, and finds the errors.
    """
    group = parser.add_argument_group(
        "hyper-connections", "Manifold-Constrained Hyper-Connections (mHC)."
    )
    for option in mhc_options():
        group.add_argument(
            option.flag,
            dest=option.dest,
            default=option.default,
            metavar=option.values,
            help=f"{option.help} Default: {option.default}.".replace("%", "%%"),
        )
    return parser


def mhc_from_args(args: Namespace) -> MHCConfig:
    """The configuration from parsed ``--mhc-*`` flags.

    Args:
        args: from a parser with ``add_mhc_args``.

    Raises:
        UserError: a value is not allowed; the message names the flag.
    """
    return _built(_given_flags(args), lambda option: option.flag)


def pipeline_from_args(args: Namespace) -> dict[str, str]:
    """``schedule``, ``overlap`` and ``messages`` of a ``ParallelConfig``, which checks them.

    Args, raises: as for ``mhc_from_args``.
    """
    given = _given_flags(args)
    return {name: given[name] for name in _PIPELINE}


def log_timing_from_args(args: Namespace) -> int:
    """``--mhc-log-timing``: iterations between two that are timed, 0 for none.

    Args, raises: as for ``mhc_from_args``.
    """
    return _log_timing(_given_flags(args), lambda option: option.flag)


def _given_flags(args: Namespace) -> dict[str, str]:
    missing = [option.flag for option in mhc_options() if not hasattr(args, option.dest)]
    if missing:
        raise UserError(
            f"the parsed arguments have no {missing[0]}; hand add_mhc_args to Megatron as "
            "extra_args_provider, and do not use --yaml-cfg, which replaces all arguments"
        )
    return {option.name: str(getattr(args, option.dest)) for option in mhc_options()}


def mhc_from_environment(variables: Mapping[str, str]) -> MHCConfig:
    """The configuration from ``MHC_*`` variables; what is not set keeps its default.

    Args:
        variables: the environment, or its part that begins with ``MHC_``.

    Raises:
        UserError: a variable that begins with ``MHC_`` is unknown, or its value is not allowed;
            the message names the variable.
    """
    given = _given_variables(variables)
    for option in mhc_options():
        if option.name in _PIPELINE and given.get(option.name, option.default) != option.default:
            raise UserError(
                f"{option.variable}={given[option.name]}: a layer spec cannot reach the pipeline; "
                f"leave it out, or use {option.flag} of mhc-megatron pretrain (docs/megatron.md)"
            )
    return _built(given, lambda option: option.variable)


def log_timing_from_environment(variables: Mapping[str, str]) -> int:
    """``MHC_LOG_TIMING``: iterations between two that are timed, 0 for none.

    Args, raises: as for ``mhc_from_environment``.
    """
    return _log_timing(_given_variables(variables), lambda option: option.variable)


def _given_variables(variables: Mapping[str, str]) -> dict[str, str]:
    options = {option.variable: option for option in mhc_options()}
    given = {}
    for variable, text in variables.items():
        if variable.startswith("MHC_"):
            if variable not in options:
                raise UserError(f"unknown variable {variable}; there are {', '.join(options)}")
            given[options[variable].name] = text
    return given


def _built(given: Mapping[str, str], spelled: Callable[[Option], str]) -> MHCConfig:
    spellings = {option.name: spelled(option) for option in mhc_options()}
    _log_timing(given, spelled)
    ours = (*_PIPELINE, _LOG_TIMING)
    overrides = [f"{name}={text}" for name, text in given.items() if name not in ours]
    try:
        return apply_overrides(MHCConfig(), overrides)
    except UserError as error:
        raise UserError(respelled(str(error), spellings)) from None


def _log_timing(given: Mapping[str, str], spelled: Callable[[Option], str]) -> int:
    text = given.get(_LOG_TIMING, "0")
    if not re.fullmatch(r"[0-9]+", text):
        [spelling] = [spelled(option) for option in mhc_options() if option.name == _LOG_TIMING]
        raise UserError(
            f"{spelling}={text} is not a number of iterations; use 0 for no timing, or as many as "
            "--log-interval"
        )
    return int(text)


def respelled(message: str, spellings: Mapping[str, str]) -> str:
    """``message`` with its fields respelled: ``name=`` anywhere, and words with ``_`` or a dot."""
    names = [re.escape(name) for name in sorted(spellings, key=len, reverse=True)]
    words = "|".join(name for name in names if "_" in name or "." in name)
    pattern = rf"\b(?:{'|'.join(names)})(?==)|\b(?:{words})\b"
    return re.sub(pattern, lambda found: spellings[found.group()], message)


def _values(annotation: Any) -> str:
    """``a|b`` for a Literal, else the type's name."""
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    parts = [part for part in get_args(annotation) if part is not type(None)] or [annotation]
    return "|".join(part.__name__.upper() for part in parts)


def _attribute_texts(cls: type) -> dict[str, str]:
    """What the ``Attributes`` section of a docstring says of each name."""
    _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        entry = re.fullmatch(r"    (\w+(?:, \w+)*): (.*)", line)
        if entry:
            names = entry.group(1).split(", ")
            texts |= dict.fromkeys(names, entry.group(2))
        elif line.startswith("        "):
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
        else:
            break
    return {name: text.replace("``", "") for name, text in texts.items()}
