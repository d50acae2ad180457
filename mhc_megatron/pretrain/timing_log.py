"""The hyper-connections' time in the log and the TensorBoard of Megatron's training loop.

One seam: a forward hook of every chunk, which sees an iteration begin and the one before it end.
"""

from typing import Any

import torch

from mhc_megatron.megatron.chain import chain_of
from mhc_megatron.report.tensorboard import timing_scalars
from mhc_megatron.timing import HyperConnectionTimer
from mhc_megatron.training.probe import hyper_connections


class TimingLog:
    """Times every ``interval``-th iteration on the last rank, whose log and writer Megatron uses.

    Other iterations and ranks are not observed. What was measured is written when the next forward
    begins: its iteration has ended, with the optimizer's step, and nothing has waited before.

    Args:
        interval: in iterations, at least 1.
    """

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._chunks: list[torch.nn.Module] = []
        self._iteration: int | None = None
        self._timer: HyperConnectionTimer | None = None

    def watch(self, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Hook this rank's model chunks; a ``pre_wrap_hook`` of Megatron's model configuration.

        Before that of ``GainLog``: in a validation this one lets go of the hyper-connections.
        """
        from megatron.training.utils import is_last_rank

        if is_last_rank():
            self._chunks = chunks
            for chunk in chunks:
                chunk.register_forward_pre_hook(self._before_forward)
        return chunks

    def _before_forward(self, chunk: torch.nn.Module, *_: Any) -> None:
        from megatron.training import get_args

        iteration = get_args().curr_iteration + 1 if chunk.training else None
        if iteration == self._iteration:
            return
        if self._timer is not None:
            assert self._iteration is not None
            self._write(self._timer.milliseconds(), self._iteration)
        self._iteration, self._timer = iteration, None
        if iteration is not None and iteration % self._interval == 0:
            on_gpu = next(chunk.parameters()).is_cuda
            self._timer = HyperConnectionTimer(on_gpu=on_gpu)
        self._attach(self._timer)

    def _attach(self, timer: HyperConnectionTimer | None) -> None:
        for chunk in self._chunks:
            for connection in hyper_connections(chunk):
                connection.observer = None if timer is None else timer.kernel
            chain = chain_of(chunk)
            if chain is not None and chain.recompute is not None:
                chain.recompute.observer = None if timer is None else timer.rebuild

    def _write(self, milliseconds: dict[str, float], iteration: int) -> None:
        from megatron.training import get_tensorboard_writer, print_rank_last

        parts = "".join(f" {kind}: {value:.3f} |" for kind, value in milliseconds.items())
        print_rank_last(f" hyper-connections in iteration {iteration} (ms) |{parts}")
        writer = get_tensorboard_writer()
        if writer is not None:
            for tag, value in timing_scalars(milliseconds):
                writer.add_scalar(tag, value, iteration)
