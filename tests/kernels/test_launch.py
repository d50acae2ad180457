"""Remembered launches: what Triton would compile anew is another kind; nothing else is called."""

from itertools import product
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import native_specialize_impl

from mhc_megatron.kernels.triton import compiled
from mhc_megatron.kernels.triton.compiled import Launch, Part, Prepared, current_stream, kind_of

# The current one of CUDA, of every device.
STREAM = 17
BUFFER = torch.zeros(256, dtype=torch.uint8)
TENSORS = [
    None,
    *(
        BUFFER[offset : offset + 64].view(dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for offset in (0, 16, 4, 8)
    ),
]
NUMBERS = [0, 1, 2, 15, 16, 17, 32, 4096, 2**31 - 1, 2**31, 2**31 + 1, 2**40, -1, -16, 0.0, 1.0]


def pointers(tensors: tuple[Tensor | None, ...]) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def specialisation(*arguments: object) -> list[object]:
    """What Triton keys its compiled kernels by, of the arguments at run time."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    return [native_specialize_impl(backend, value, False, True, True) for value in arguments]


def test_equal_kinds_are_one_kernel_to_triton_and_other_kinds_another() -> None:
    assert BUFFER.data_ptr() % 16 == 0
    seen: dict[tuple, list] = {}
    tensors = list(product(TENSORS, repeat=2))
    cases = [(pair, (5, 1e-6)) for pair in tensors]
    cases += [((TENSORS[1], None), pair) for pair in product(NUMBERS, repeat=2)]
    for given, numbers in cases:
        kind = kind_of(given, pointers(given), numbers)
        expected = specialisation(*given, *numbers)
        assert seen.setdefault(kind, expected) == expected, (given, numbers)
    # Kinds tell apart no more than Triton does, or kernels would be compiled twice.
    assert len(seen) == len({str(value) for value in seen.values()})


class Handle:
    """Stands for a compiled kernel."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.observed: list[tuple] = []

    def run(self, x: int, y: int, z: int, stream: int, *arguments: Any) -> None:
        hooks = (None, None, None)
        assert (stream, *arguments[:5]) == (STREAM, self.function, self.packed_metadata, *hooks)
        self.calls.append(((x, y, z), arguments[5:]))

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.observed.append((grid, arguments))


class Kernel:
    """Stands for a kernel that Triton compiles."""

    __name__ = "kernel"
    arg_names = ("x_ptr", "y_ptr", "T", "eps", "N", "BT")

    def __init__(self) -> None:
        self.arg_names = list(self.arg_names)
        self.compiled: list[tuple] = []
        self.handles: list[Handle] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: object, **keywords: object) -> Handle:
            self.compiled.append((grid, arguments, keywords))
            self.handles.append(Handle())
            return self.handles[-1]

        return launch


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The current device, of a machine that need have none."""
    current = [0]
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)
    monkeypatch.setattr(compiled, "driver", Mock(active=Mock(get_current_stream=lambda _: STREAM)))
    return current


def test_the_second_launch_of_a_kind_takes_the_handle(devices: list[int]) -> None:
    kernel = Kernel()
    launch = Launch(kernel, num_warps=8, N=4, BT=16)
    x, other = torch.zeros(8), torch.ones(8)
    launch((3,), (x, None), (7, 1e-6))
    assert kernel.compiled == [((3,), (x, None, 7, 1e-6), {"num_warps": 8, "N": 4, "BT": 16})]
    assert kernel.handles[0].calls == []
    launch((5, 2), (other, None), (9, 1e-3))
    assert len(kernel.compiled) == 1
    # Every argument in the kernel's order, constants included, as CompiledKernel takes them.
    assert kernel.handles[0].calls == [((5, 2, 1), (other.data_ptr(), None, 9, 1e-3, 4, 16))]


@pytest.mark.parametrize(
    "change",
    ["dtype", "none", "alignment", "one", "sixteen", "wide", "device"],
)
def test_another_kind_is_compiled(change: str, devices: list[int]) -> None:
    kernel = Kernel()
    launch = Launch(kernel, num_warps=4, N=4, BT=16)
    x = torch.zeros(32)
    launch((1,), (x, x), (7, 1e-6))
    tensors: tuple[Tensor | None, Tensor | None] = (x, x)
    tokens = {"one": 1, "sixteen": 48, "wide": 2**31}.get(change, 7)
    if change == "dtype":
        tensors = (x, x.bfloat16())
    if change == "none":
        tensors = (x, None)
    if change == "alignment":
        tensors = (x, x[1:])
    if change == "device":
        devices[0] = 1
    launch((1,), tensors, (tokens, 1e-6))
    launch((1,), tensors, (tokens, 1e-6))
    assert len(kernel.compiled) == 2
    assert len(kernel.handles[1].calls) == 1
    devices[0] = 0
    launch((1,), (x, x), (7, 1e-6))
    assert len(kernel.compiled) == 2
    assert len(kernel.handles[0].calls) == 1


def test_a_kernel_that_hooks_kept_from_compiling_is_launched_by_triton_again(
    devices: list[int],
) -> None:
    class Hooked(Kernel):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **keywords: self.compiled.append((grid,))

    kernel = Hooked()
    launch = Launch(kernel, num_warps=4, N=4, BT=16)
    for _ in range(2):
        launch((1,), (None, None), (7, 1e-6))
    assert len(kernel.compiled) == 2


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_hears_of_the_launches(
    hook: str, devices: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    launch = Launch(kernel, num_warps=8, N=4, BT=16)
    launch((3,), (None, None), (7, 1e-6))
    # Of Triton 3.3, where a hook is a function, and of later ones, with a chain of them.
    for listener in (Mock(spec=()), Mock(calls=[print])):
        monkeypatch.setattr(compiled.HOOKS, hook, listener)
        launch((5, 2), (None, None), (7, 1e-6))
    assert kernel.handles[0].observed == [((5, 2, 1), (None, None, 7, 1e-6, 4, 16))] * 2
    assert kernel.handles[0].calls == []


def prepared(kernel: Kernel, **parts: Part) -> Prepared:
    return Prepared(Launch(kernel, num_warps=8, N=4, BT=16), (3,), (7, 1e-6), parts)


def test_a_prepared_launch_passes_addresses_of_parts(devices: list[int]) -> None:
    kernel, x, other = Kernel(), torch.zeros(8), torch.zeros(8)
    buffer, another = torch.arange(32.0), torch.zeros(32)
    launch = prepared(kernel, y_ptr=Part(first=64, size=5, dtype=torch.bfloat16))
    launch(STREAM, x, buffer)
    ((grid, (first, part, *numbers), _),) = kernel.compiled
    assert (grid, first, numbers) == ((3, 1, 1), x, [7, 1e-6])
    # A view for Triton, which asks for the dtype.
    assert torch.equal(part, buffer[16:].view(torch.bfloat16)[:5])
    launch(STREAM, other, another)
    assert len(kernel.compiled) == 1
    addresses = other.data_ptr(), another.data_ptr() + 64
    assert kernel.handles[0].calls == [((3, 1, 1), (*addresses, 7, 1e-6, 4, 16))]


def test_a_prepared_launch_of_another_alignment_is_another_kind(devices: list[int]) -> None:
    kernel, x = Kernel(), torch.zeros(32)
    launch = prepared(kernel)
    # The kind of multiples of 16 bytes is not the first that is seen.
    for _ in range(2):
        launch(STREAM, x[1:], None)
        launch(STREAM, x, None)
    assert len(kernel.compiled) == 2
    unaligned, aligned = kernel.handles
    assert [arguments[0] for _, arguments in unaligned.calls] == [x.data_ptr() + 4]
    assert [arguments[0] for _, arguments in aligned.calls] == [x.data_ptr()]


def test_where_a_kernel_needs_alignment_another_does_without(devices: list[int]) -> None:
    kernel, other, x = Kernel(), Kernel(), torch.zeros(32)
    del other.arg_names[1]
    stand_in = Launch(other, num_warps=4, N=4, BT=32)
    own = Launch(kernel, num_warps=8, N=4, BT=16)
    launch = Prepared(own, (3,), (7, 1e-6), unaligned=stand_in)
    for _ in range(2):
        launch(STREAM, x, None)
        launch(STREAM, x[1:], None)
    assert [len(kernel.compiled), len(other.compiled)] == [1, 1]
    ((grid, (first, *numbers), _),) = other.compiled
    assert (grid, first.data_ptr(), numbers) == ((3, 1, 1), x.data_ptr() + 4, [7, 1e-6])
    assert kernel.handles[0].calls == [((3, 1, 1), (x.data_ptr(), None, 7, 1e-6, 4, 16))]
    assert other.handles[0].calls == [((3, 1, 1), (x.data_ptr() + 4, 7, 1e-6, 4, 32))]


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_hears_of_prepared_launches(
    hook: str, devices: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, cuda = Kernel(), torch.device("cuda", 0)
    launch = prepared(kernel)
    launch(current_stream(cuda), None, None)
    launch(current_stream(cuda), None, None)
    monkeypatch.setattr(compiled.HOOKS, hook, Mock(calls=[print]))
    launch(current_stream(cuda), None, None)
    assert len(kernel.handles[0].calls) == len(kernel.handles[0].observed) == 1


def test_equal_numbers_of_another_type_are_another_kind() -> None:
    assert kind_of((), (), (1, 0)) != kind_of((), (), (1, 0.0))


def test_constants_in_another_order_are_refused() -> None:
    with pytest.raises(TypeError, match=r"kernel: constants \['BT', 'N'\], not \['N', 'BT'\]"):
        Launch(Kernel(), num_warps=4, BT=16, N=4)
