"""Triton's interpreter, made faster: it spends most of its time on what it has done before.

It prepares Triton's language for every call of a device function, within a kernel that has prepared
it already, and a type's shape for every tensor; and what it computes of overflows nobody reads.
"""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any


def interpret_faster() -> None:
    """With the same results. TRITON_INTERPRET has to be set by now, which Triton reads when it is
    imported."""
    from triton.runtime import interpreter

    if interpreter._patch_lang.__module__ == __name__:
        return
    prepare_language_once()
    find_numpy_types_once()
    make_shapes_once()
    leave_overflows_alone()


def prepare_language_once() -> None:
    """Per kernel, for all functions that it calls."""
    import triton.language as tl
    from triton.runtime import interpreter

    # The function whose modules of the language are prepared: of both that there are.
    any_function = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    prepare, prepared = interpreter._patch_lang, False

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


def find_numpy_types_once() -> None:
    """Triton makes a table of all for every look into it."""
    from triton.runtime import interpreter

    numpy_type = interpreter._get_np_dtype
    of_a_number = functools.cache(numpy_type)

    def of_any(type: Any) -> Any:
        scalar = type.scalar
        return numpy_type(scalar) if scalar.is_ptr() else of_a_number(scalar)

    interpreter._get_np_dtype = of_any


def make_shapes_once() -> None:
    """One object per shape, which types and tensors share; types that do need no broadcast."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic

    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    broadcast = TritonSemantic.broadcast_impl_value

    @functools.cache
    def made(*sizes: int) -> tuple[Any, Any]:
        block, tensor = object.__new__(tl.block_type), object.__new__(tl.tensor)
        make_type(block, tl.float32, list(sizes))
        make_tensor(tensor, None, block)
        return block, tensor

    def block_type(block: Any, element_ty: Any, shape: Any) -> None:
        assert isinstance(shape, (list, tl.tuple))  # as in Triton
        sizes = [s.value if isinstance(s, tl.constexpr) else s for s in shape]
        of_shape, block.of_tensor = made(*sizes)
        block.element_ty, block.shape, block.numel = element_ty, of_shape.shape, of_shape.numel
        block.name = of_shape.name.replace("fp32", str(element_ty))

    def tensor(made: Any, handle: Any, type: Any) -> None:
        if type.is_block():
            made.handle, made.type, made.dtype = handle, type, type.element_ty
            made.shape, made.numel = type.of_tensor.shape, type.of_tensor.numel
        else:
            make_tensor(made, handle, type)

    def broadcast_if_needed(self: Any, left: Any, right: Any) -> tuple[Any, Any]:
        both = left.type.is_block() and right.type.is_block()
        same = both and left.type.shape is right.type.shape
        return (left, right) if same else broadcast(self, left, right)

    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor
    TritonSemantic.broadcast_impl_value = broadcast_if_needed


def leave_overflows_alone() -> None:
    """Whether whole numbers overflow is computed, and asserted only with Triton's ``debug``."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
