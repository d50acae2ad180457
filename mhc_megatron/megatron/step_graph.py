"""A whole training step's forwards and backwards as one CUDA graph.

Launching a step takes the host as long as its kernels are many, and hyper-connections add small
ones; a graph is launched once. What Megatron calls full-iteration graphs
(``megatron.core.full_cuda_graph``) is this, but keeps one graph per process, captures validation
too, and in core 0.16 captures on another stream than that of the steps before.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakSet

import torch
from megatron.core.tensor_parallel.random import get_all_rng_states
from torch import Tensor

from mhc_megatron.errors import UserError
from mhc_megatron.megatron.compat import reuse_memory_of_lanes

# Kernels are compiled and loaded, communicators and workspaces made, before anything is captured.
EAGER_STEPS = 2

Batch = dict[str, Tensor]

_in_use: "WeakSet[StepGraph]" = WeakSet()


def forget_graphs() -> None:
    """Let every ``StepGraph`` begin again. NCCL waits for graphs that use a group to be gone before
    it ends that group, for ever: call this before ``torch.distributed.destroy_process_group``.
    """
    for step in list(_in_use):
        step.forget()


@lru_cache(maxsize=1)
def capture_stream() -> "torch.cuda.Stream":
    """Of all steps that are, or are to be, captured.

    Wrap chunks in DistributedDataParallel on it: its hooks run on the stream on which it was made.

    Raises:
        UserError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise UserError("cuda_graph=True needs a GPU that torch can use; set cuda_graph=False")
    return torch.cuda.Stream()


class StepGraph:
    """``forward_backward_func`` whose training steps are replays of one graph.

    The first steps run as they are, the next is captured. The graph reads the micro-batches and
    writes the losses at places of its own, and gradients where they always are. Validation runs as
    it is.

    Args:
        function: Megatron's, or a ``ForwardBackward``. Its steps must be alike: shapes, number of
            micro-batches, and no decision of the host's that depends on what the GPU computes.
    """

    def __init__(self, function: Callable[..., list[Any]]) -> None:
        self.function = function
        self._stream = capture_stream()
        self.forget()
        _in_use.add(self)

    def forget(self) -> None:
        """Begin again with steps that run as they are: the model has other tensors now."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batches: list[list[Batch]] = []
        self._reports: list[Any] = []
        self._steps = 0

    def __call__(
        self,
        *,
        data_iterator: Iterator[Batch] | list[Iterator[Batch]],
        num_microbatches: int,
        forward_only: bool = False,
        **arguments: Any,
    ) -> list[Any]:
        """As Megatron's; ``data_iterator`` yields dictionaries of tensors.

        Raises:
            UserError: the step cannot be captured, or micro-batches have another shape than the
                captured ones.
        """
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        batches = [[next(data) for _ in range(num_microbatches)] for data in iterators]

        def run(micro_batches: list[list[Batch]]) -> list[Any]:
            return self.function(
                data_iterator=[iter(chunk) for chunk in micro_batches],
                num_microbatches=num_microbatches,
                forward_only=forward_only,
                **arguments,
            )

        caller = torch.cuda.current_stream()
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                if forward_only:
                    return run(batches)
                self._steps += 1
                if self._steps <= EAGER_STEPS:
                    return run(batches)
                if self._graph is None:
                    self._capture(batches, run)
                else:
                    _copy(batches, self._batches)
                assert self._graph is not None
                self._graph.replay()
                return self._reports
        finally:
            caller.wait_stream(self._stream)

    def _capture(
        self, batches: list[list[Batch]], run: Callable[[list[list[Batch]]], list[Any]]
    ) -> None:
        self._batches = [
            [{name: tensor.clone() for name, tensor in batch.items()} for batch in chunk]
            for chunk in batches
        ]
        reuse_memory_of_lanes()
        graph = torch.cuda.CUDAGraph()
        generators = list(get_all_rng_states().values())
        for generator in generators:
            graph.register_generator_state(generator)
        generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
        # A capture that fails leaves generators that count on inside a graph.
        before = [generator.clone_state() for generator in generators]
        try:
            # Other threads, as NCCL's, may ask for their events meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._reports = run(self._batches)
        except RuntimeError as error:
            for generator, state in zip(generators, before, strict=True):
                generator.graphsafe_set_state(state)
            raise UserError(
                f"cuda_graph=True: the step cannot be captured: {_origin(error)}; set "
                "cuda_graph=False"
            ) from error
        self._graph = graph


def _origin(error: BaseException) -> str:
    """What came before the end of the capture, which says only that something did."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _copy(batches: Sequence[Sequence[Batch]], places: Sequence[Sequence[Batch]]) -> None:
    for chunk, own in zip(batches, places, strict=True):
        for batch, place in zip(chunk, own, strict=True):
            for name, tensor in batch.items():
                if tensor.shape != place[name].shape:
                    raise UserError(
                        f"cuda_graph=True: {name} of a micro-batch has shape "
                        f"{tuple(tensor.shape)}, and the captured step {tuple(place[name].shape)}; "
                        "give all micro-batches one shape, or set cuda_graph=False"
                    )
                place[name].copy_(tensor)
