"""Objects and numbers of a cost file, with errors that name the key, the value and the remedy."""

import difflib
import json
from collections.abc import Collection
from typing import Any

from mhc_megatron.pipeline.errors import ScheduleError

# Sums over a step of millions of actions stay exact in 64 bits.
LARGEST = 10**12


class _Object(dict[str, Any]):
    """An object that remembers a key that the text gives twice, of which a dict keeps one value."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.twice = next((name for name in names if names.count(name) > 1), None)


def parse(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ScheduleError: it is no JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_Object, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise ScheduleError(f"not JSON: {error}") from None


def _integer(digits: str) -> int | float:
    """Of thousands of digits Python makes no int; whatever has so many is above all limits."""
    return int(digits) if len(digits) <= 100 else float(digits)


def fields(value: Any, names: Collection[str] | None, where: str = "") -> dict[str, Any]:
    """An object of the text.

    Args:
        value: from ``parse``, or a dict.
        names: keys that it may have; None for any, numbers of stages.
        where: the key that it stands at; empty for the whole text.

    Raises:
        ScheduleError: it is no object, or has an unknown key, or one twice.
    """
    known = ' such as {"0": {...}}' if names is None else f" with {', '.join(names)}"
    if not isinstance(value, dict):
        raise ScheduleError(f"{where or 'the file'}: {json.dumps(value)} is not an object{known}")
    for name in value:
        if names is not None and name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ScheduleError(
                f"{where or 'the file'}: unknown field {name!r}; {hint}known: {', '.join(names)}"
            )
    if isinstance(value, _Object) and value.twice is not None:
        raise ScheduleError(f"{at(where, value.twice)} is given twice; keep one of them")
    return dict(value)


def check_number(
    name: str,
    value: Any,
    *,
    whole: bool = False,
    zero: str | None = None,
    most: float = LARGEST,
) -> None:
    """Whether ``value`` is a number in its range; null is none: what is not known is left out.

    Args:
        name: of the value, with all keys.
        value: from ``parse``.
        whole: no fraction.
        zero: what to do instead of writing 0, which is refused; None where 0 is fine.
        most: the largest.
    """
    given = json.dumps(value)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        kind, example = ("whole number", "4096") if whole else ("number", "2.5")
        raise ScheduleError(
            f"{name}={given} is not a {kind}; write one such as {example}, or leave it out"
        )
    if not value >= 0 or (zero is not None and value == 0):
        remedy = zero if zero is not None and value == 0 else "write a measured value"
        least = "at least 0" if zero is None else "above 0"
        raise ScheduleError(f"{name}={given} must be {least}; {remedy}")
    if not value <= most:
        remedy = "give the bytes of one micro-batch" if whole else "change the unit"
        raise ScheduleError(f"{name}={given} is above {most:.0e}; {remedy}")


def at(where: str, name: str) -> str:
    """The name of a key with those that it stands in."""
    return f"{where}.{name}" if where else name
