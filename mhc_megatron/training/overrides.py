"""Nested frozen dataclasses as flat ``section.key`` names: overriding, storing, comparing.

Pure: no torch. The types of the fields are the only schema.
"""

import dataclasses
import difflib
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mhc_megatron.errors import UserError

Config = TypeVar("Config")


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """``config`` with fields replaced, as in ``["parallel.tensor=2", "mhc.projection=identity"]``.

    All overrides take effect together, inner dataclasses first, so that checks across fields see
    the final values only. Of two overrides of one key the last counts.

    Args:
        config: a frozen dataclass whose fields are bool, int, float, str, Literal, an optional
            one of these, or again such dataclasses.
        overrides: ``key=value`` texts; ``true``/``false`` for bool, ``none`` for an optional.

    Raises:
        UserError: unknown key (with the nearest one), or a value of the wrong type, or a check of
            a dataclass fails.
    """
    changes: dict[str, Any] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        key = key.strip()
        if not separator or not key:
            raise UserError(f"override {override!r} is not of the form key=value")
        changes[key] = _parse(key, text.strip(), _field_type(config, key))
    return _replaced(config, changes)


def flatten(config: object) -> dict[str, Any]:
    """Every leaf value by its full key, ``{"model.num_layers": 4, ..., "steps": 200, ...}``."""
    return dict(_leaves(config, ""))


def to_dict(config: object) -> dict[str, Any]:
    """Nested dictionaries of plain values, ready for JSON."""
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    return dataclasses.asdict(config)


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """The inverse of ``to_dict``.

    Raises:
        UserError: a key is unknown or missing, a value has the wrong type, or a check of the
            dataclass fails.
    """
    return _built(cls, values, "")


def differences(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """``(key, value in a, value in b)`` of every leaf that differs; both have the same type."""
    assert type(a) is type(b)
    left, right = flatten(a), flatten(b)
    return [(key, left[key], right[key]) for key in left if left[key] != right[key]]


def _leaves(config: object, prefix: str) -> Iterator[tuple[str, Any]]:
    assert dataclasses.is_dataclass(config)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def _field_type(config: object, key: str) -> Any:
    """The annotation of the leaf ``key``; a UserError if there is none."""
    section: Any = type(config)
    names = key.split(".")
    for depth, name in enumerate(names):
        hints = get_type_hints(section) if dataclasses.is_dataclass(section) else {}
        if name not in hints:
            raise _unknown_key(config, key, section, ".".join(names[:depth]))
        section = hints[name]
    if dataclasses.is_dataclass(section):
        inner = ", ".join(f"{key}.{field.name}" for field in dataclasses.fields(section))
        raise UserError(f"{key} is a section, not a value; set one of {inner}")
    return section


def _unknown_key(config: object, key: str, section: Any, prefix: str) -> UserError:
    """Names the nearest key of all and what stands beside the place that was looked in."""
    if not dataclasses.is_dataclass(section):
        return UserError(f"unknown key {key!r}: {prefix} is a value and has no parts")
    known = list(flatten(config))
    leaf = key.rpartition(".")[2]
    # A forgotten or wrong section ("tensor=2") is as common as a misspelt name.
    nearest = [name for name in known if name.rpartition(".")[2] == leaf]
    nearest = nearest or difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    siblings = ", ".join(field.name for field in dataclasses.fields(section))
    return UserError(f"unknown key {key!r}: {hint}{prefix or 'the top level'} has {siblings}")


def _parse(key: str, text: str, annotation: Any) -> Any:
    """``text`` as a value of the type ``annotation``."""
    options, optional = _options(annotation)
    lowered = text.lower()
    if optional and lowered == "none":
        return None
    for option in options:
        if get_origin(option) is Literal:
            for allowed in get_args(option):
                if text == str(allowed):
                    return allowed
        elif option is bool:
            if lowered in ("true", "false"):
                return lowered == "true"
        elif option is str:
            return text
        else:
            assert option in (int, float), f"{key}: no conversion to {option}"
            try:
                value = option(text)
            except ValueError:
                continue
            if math.isfinite(value):
                return value
    raise UserError(f"{key}={text} is not {_expected(annotation)}")


def _check(key: str, value: Any, annotation: Any) -> Any:
    """``value``, which came from JSON, if it has the type ``annotation``; ints pass as floats."""
    options, optional = _options(annotation)
    if optional and value is None:
        return None
    for option in options:
        if get_origin(option) is Literal:
            if any(
                value == allowed and type(value) is type(allowed) for allowed in get_args(option)
            ):
                return value
        elif option is float:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
        elif isinstance(value, option) and not (option is int and isinstance(value, bool)):
            return value
    raise UserError(f"{key}={value!r} is not {_expected(annotation)}")


def _options(annotation: Any) -> tuple[list[Any], bool]:
    """The alternatives of a type without None, and whether None was one of them."""
    if get_origin(annotation) in (Union, types.UnionType):
        parts = get_args(annotation)
        return [part for part in parts if part is not types.NoneType], types.NoneType in parts
    return [annotation], False


def _expected(annotation: Any) -> str:
    options, optional = _options(annotation)
    names = {bool: "true or false", int: "an integer", float: "a finite number", str: "text"}
    texts = [
        f"one of {', '.join(map(str, get_args(option)))}"
        if get_origin(option) is Literal
        else names[option]
        for option in options
    ]
    return " or ".join([*texts, "none"] if optional else texts)


def _replaced(config: Config, changes: Mapping[str, Any]) -> Config:
    """``dataclasses.replace``, bottom-up, so that each ``__post_init__`` runs on final values."""
    here: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        name, _, rest = key.partition(".")
        if rest:
            inner.setdefault(name, {})[rest] = value
        else:
            here[name] = value
    for name, below in inner.items():
        here[name] = _replaced(getattr(config, name), below)
    return dataclasses.replace(config, **here) if here else config  # type: ignore[type-var]


def _built(cls: type[Config], values: Any, prefix: str) -> Config:
    where = prefix.rstrip(".") or cls.__name__
    if not isinstance(values, Mapping):
        raise UserError(f"{where}={values!r} is not a section (a mapping of keys to values)")
    hints: dict[str, Any] = get_type_hints(cls)
    unknown = [f"{prefix}{name}" for name in values if name not in hints]
    missing = [f"{prefix}{name}" for name in hints if name not in values]
    for problem, names in (("unknown", unknown), ("missing", missing)):
        if names:
            raise UserError(
                f"configuration {where}: {problem} {', '.join(names)}; was it written by "
                "another version?"
            )
    fields: dict[str, Any] = {}
    for name, hint in hints.items():
        section: Any = hint
        if dataclasses.is_dataclass(hint):
            fields[name] = _built(section, values[name], f"{prefix}{name}.")
        else:
            fields[name] = _check(f"{prefix}{name}", values[name], hint)
    return cls(**fields)
