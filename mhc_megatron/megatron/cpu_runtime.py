"""Real megatron-core on a machine without a GPU, over gloo.

megatron-core names CUDA in many places: ``torch.cuda.current_device()``, ``device="cuda"``,
``Tensor.cuda()``, the CUDA generator, dtype strings such as ``torch.cuda.FloatTensor``.
``cpu_runtime()`` is a context in which those calls mean the CPU. It changes attributes of
``torch`` while it is open and puts every one back when it closes; it changes nothing in Megatron,
and nothing at all where CUDA is available.

    with cpu_runtime():
        torch.distributed.init_process_group("gloo")
        parallel_state.initialize_model_parallel(...)
        ...

What it is for: developing and debugging layouts (TP, SP, PP, EP, CP, DP) without a GPU. What it
cannot do: Transformer Engine modules, FP8, CUDA graphs, fused kernels; asking for them fails as it
does anywhere without them.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
# What a device can be given as; looked for in the arguments of every operation.
_DEVICES = frozenset((str, torch.device))
_TYPE = Tensor.type


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class _CudaMeansCPU(TorchFunctionMode):
    """Sends ``device="cuda"`` to the CPU and answers dtype strings as a CUDA tensor would."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for arg in args:
            if type(arg) in _DEVICES:
                args = tuple(_CPU if _is_cuda(arg) else arg for arg in args)
                break
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
            return func(*args, **kwargs)
        if func is _TYPE and len(args) == 1:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args)


class _Stream:
    """Stands for any CUDA stream: work on the CPU is already ordered."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.device = _CPU

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        return event or _Event()


class _Event:
    """Stands for any CUDA event: complete as soon as it is recorded."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _doing_nothing() -> Callable[..., None]:
    """A new function every time: torch.compile refuses one function under two names."""
    return lambda *args, **kwargs: None


def _returning_itself() -> Callable[..., Any]:
    return lambda itself, *args, **kwargs: itself


def _as_list(splits: Any) -> list[int] | None:
    return None if splits is None else [int(size) for size in splits]


def _substitutes() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, what stands there while the context is open)."""
    cuda = torch.cuda
    one_stream = _Stream()

    def get_rng_state(device: object = "cuda") -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: Tensor, device: object = "cuda") -> None:
        torch.set_rng_state(state)

    all_to_all_single = torch.distributed.all_to_all_single

    def all_to_all_with_lists(
        output: Tensor,
        input: Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        # Megatron turns the splits into arrays only while it moves them off a GPU.
        return all_to_all_single(
            output,
            input,
            output_split_sizes=_as_list(output_split_sizes),
            input_split_sizes=_as_list(input_split_sizes),
            **kwargs,
        )

    return [
        (torch.distributed, "all_to_all_single", all_to_all_with_lists),
        (cuda, "current_device", lambda: _CPU),
        (cuda, "is_initialized", lambda: True),
        (cuda, "_lazy_init", _doing_nothing()),
        (cuda, "set_device", _doing_nothing()),
        (cuda, "synchronize", _doing_nothing()),
        (cuda, "empty_cache", _doing_nothing()),
        (cuda, "device_count", lambda: 1),
        (cuda, "manual_seed", torch.manual_seed),
        (cuda, "get_rng_state", get_rng_state),
        (cuda, "set_rng_state", set_rng_state),
        (cuda.random, "get_rng_state", get_rng_state),
        (cuda.random, "set_rng_state", set_rng_state),
        (cuda, "default_generators", _Generators()),
        (cuda, "Stream", _Stream),
        (cuda, "Event", _Event),
        (cuda, "current_stream", lambda device=None: one_stream),
        (cuda, "default_stream", lambda device=None: one_stream),
        (cuda, "stream", lambda stream: contextlib.nullcontext()),
        (cuda.nvtx, "range_push", _doing_nothing()),
        (cuda.nvtx, "range_pop", _doing_nothing()),
        (Tensor, "cuda", _returning_itself()),
        (Tensor, "pin_memory", _returning_itself()),
        (Tensor, "record_stream", _doing_nothing()),
        (torch.nn.Module, "cuda", _returning_itself()),
    ]


class _Generators:
    """The list of per-device generators: every index is the CPU's."""

    def __getitem__(self, index: object) -> torch.Generator:
        return torch.default_generator


@contextlib.contextmanager
def cpu_runtime_in_thread() -> Iterator[None]:
    """What a thread that is started inside ``cpu_runtime`` enters: torch's modes are a thread's."""
    if torch.cuda.is_available():
        yield
        return
    with _CudaMeansCPU():
        yield


@contextlib.contextmanager
def cpu_runtime() -> Iterator[None]:
    """Let megatron-core run on the CPU inside this context (no effect where CUDA is available)."""
    if torch.cuda.is_available():
        yield
        return
    with contextlib.ExitStack() as undo:
        for owner, name, substitute in _substitutes():
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, substitute)
        undo.enter_context(_CudaMeansCPU())
        yield


@contextlib.contextmanager
def training_loop_cpu_runtime() -> Iterator[None]:
    """``cpu_runtime`` for ``megatron.training.pretrain``, which asks more of its machine.

    It refuses to begin unless CUDA is available, so CUDA counts as available until the process
    groups exist; it asks for the GPU's generation, which is 0; and it compiles functions, for which
    torch asks for the GPU's name, so compiled functions run as they are written.
    """
    if torch.cuda.is_available():
        yield
        return
    substitutes: list[tuple[str, Any]] = [
        ("is_available", lambda: not torch.distributed.is_initialized()),
        ("get_device_properties", lambda device=None: SimpleNamespace(major=0, minor=0)),
    ]
    with (
        cpu_runtime(),
        torch.compiler.set_stance("force_eager"),
        contextlib.ExitStack() as undo,
    ):
        for name, substitute in substitutes:
            undo.callback(setattr, torch.cuda, name, getattr(torch.cuda, name))
            setattr(torch.cuda, name, substitute)
        yield
