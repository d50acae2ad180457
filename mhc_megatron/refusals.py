"""What does not combine: refused in one wording, by the first of a table whose condition holds."""

from collections.abc import Iterable

from mhc_megatron.errors import UserError

# Its condition, the option as a user would write it, the reason and the remedy.
Refusal = tuple[object, str, str, str]


def refuse_first(what: str, refusals: Iterable[Refusal], *, what_first: bool = False) -> None:
    """Raise a UserError for the first refusal whose condition is true.

    Args:
        what: what the options do not combine with.
        refusals: in the order in which they are looked at; the rest of a generator is not run.
        what_first: whether the message begins with ``what`` and not with the option.
    """
    for condition, option, reason, remedy in refusals:
        if condition:
            one, other = (what, option) if what_first else (option, what)
            raise UserError(f"{one} does not combine with {other}: {reason}; {remedy}")
