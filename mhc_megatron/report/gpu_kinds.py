"""What a piece of GPU work is, by its name in a profiler's trace."""

import ast
from enum import Enum
from functools import cache
from importlib.util import find_spec
from pathlib import Path


class Kind(Enum):
    """A kind of GPU work; the value is its name in tables."""

    COMMUNICATION = "communication"
    MHC = "mHC"
    COMPUTE = "other compute"
    MEMORY = "memcpy/memset"


_COMMUNICATION = ("nccl", "deep_ep", "deepep")


def kind_of(category: str, name: str) -> Kind:
    """The kind of an event of Kineto category ``kernel``, ``gpu_memcpy`` or ``gpu_memset``."""
    if category != "kernel":
        return Kind.MEMORY
    if name in mhc_kernel_names():
        return Kind.MHC
    lower = name.lower()
    return Kind.COMMUNICATION if any(n in lower for n in _COMMUNICATION) else Kind.COMPUTE


@cache
def mhc_kernel_names() -> frozenset[str]:
    """The names of the package's Triton kernels, read from their sources without importing them.

    These are the functions under ``@triton.jit`` that no other such function calls: Triton gives a
    kernel its function's name, and the called ones are compiled into their callers.
    """
    spec = find_spec("mhc_megatron.kernels")
    assert spec is not None and spec.origin is not None
    jitted: set[str] = set()
    called: set[str] = set()
    for path in sorted((Path(spec.origin).parent / "triton").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any(
                ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list
            ):
                jitted.add(node.name)
                called |= {
                    call.func.id
                    for call in ast.walk(node)
                    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
                }
    return frozenset(jitted - called)
