"""Gain magnitudes in the log and the TensorBoard of Megatron's training loop.

Three seams, none patched: a chunk's forward hooks open and close the observation, ``pretrain``'s
``non_loss_data_func`` collects after every validation, its ``process_non_loss_data_func`` writes.
"""

from functools import partial
from typing import Any

import torch

from mhc_megatron.gains import Gains, gain_magnitudes
from mhc_megatron.hyper_connection import HyperConnection
from mhc_megatron.report.curves import peak
from mhc_megatron.report.tensorboard import gain_scalars
from mhc_megatron.training.probe import MappingProbe, hyper_connections, observe


class GainLog:
    """Observes the residual mappings of validation batches; training steps run unobserved."""

    def __init__(self) -> None:
        self._probe = MappingProbe()

    def watch(self, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Hook this rank's model chunks; a ``pre_wrap_hook`` of Megatron's model configuration."""
        for chunk in chunks:
            connections = hyper_connections(chunk)
            chunk.register_forward_pre_hook(partial(self._open, connections))
            chunk.register_forward_hook(partial(self._close, connections), always_call=True)
        return chunks

    def collect(self, model: list[torch.nn.Module]) -> Gains:
        """The whole model's gains over the validation that ends, said in the log.

        ``non_loss_data_func`` of ``pretrain``: all ranks call it together.
        """
        from megatron.training import print_rank_last

        mappings = self._probe.gather()
        self._probe = MappingProbe()
        gains = gain_magnitudes(mappings.res)
        print_rank_last(
            f" composite gain | forward: {peak(gains.composite.forward):.6f} | "
            f"backward: {peak(gains.composite.backward):.6f} |"
        )
        return gains

    def write(self, gains: Gains, iteration: int, writer: Any) -> None:
        """The scalars, with the tags of ``mhc-megatron train``.

        ``process_non_loss_data_func`` of ``pretrain``: called where Megatron's writer is.
        """
        for tag, value in gain_scalars(gains):
            writer.add_scalar(tag, value, iteration)

    def _open(self, connections: list[HyperConnection], chunk: torch.nn.Module, *_: Any) -> None:
        if not chunk.training:
            observe(connections, self._probe)

    def _close(self, connections: list[HyperConnection], chunk: torch.nn.Module, *_: Any) -> None:
        if not chunk.training:
            observe(connections, None)
