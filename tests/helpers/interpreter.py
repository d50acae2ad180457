"""Triton's interpreter prepares Triton's language for every call of a device function, within a
kernel that has prepared it already: nearly half the time of a kernel of many small functions."""

from types import SimpleNamespace
from typing import Any


def prepare_language_once() -> None:
    """Per kernel, for all functions that it calls. TRITON_INTERPRET has to be set by now, which
    Triton reads when it is imported."""
    import triton.language as tl
    from triton.runtime import interpreter

    # The function whose modules of the language are prepared: of both that there are.
    any_function = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    prepare, prepared = interpreter._patch_lang, False
    if prepare.__module__ == __name__:
        return

    def prepare_once(_: Any) -> Any:
        nonlocal prepared
        if prepared:
            return interpreter._LangPatchScope()
        scope = prepare(any_function)
        restore, prepared = scope.restore, True

        def restored() -> None:
            nonlocal prepared
            prepared = False
            restore()

        scope.restore = restored
        return scope

    interpreter._patch_lang = prepare_once
