"""Tensor parallelism's collectives around a branch, as phases of their own.

Megatron's linear layers communicate by themselves: what a column-parallel one reads is gathered
before it, what a row-parallel one makes is summed after it. They leave that out where they are told
that somebody else does it (``explicit_expert_comm``, as for shared experts beside an exchange).
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from mhc_megatron.dropped import Dropped
from mhc_megatron.megatron.phases import Lanes
from mhc_megatron.megatron.split_linear import split_linear, splits
from mhc_megatron.pipeline.phases import Collectives, Lane, collective_phases

_LOGGER = logging.getLogger(__name__)

Branch = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class TensorCollectives:
    """What the linear layers of a stage's branches leave to the layers.

    Args:
        group: of tensor parallelism.
        kind: ``sequence`` with sequence parallelism.
        lanes: of this rank.
    """

    def __init__(self, group: Any, kind: Collectives, lanes: Lanes) -> None:
        self.kind = kind
        self._group, self._lanes = group, lanes

    def first(self, branch: str) -> str:
        """The phase with which ``attention`` or ``mlp`` begins."""
        return collective_phases(branch, self.kind)[0]

    def run(
        self, name: str, branch: Branch, x: Tensor, begin: Callable[..., tuple[Tensor, ...]]
    ) -> tuple[Tensor, Tensor | None]:
        """A branch between its collectives, with the sums of Megatron's own layers.

        Args:
            name: of the branch, ``attention`` or ``mlp``.
            branch: of [s, b, C], whole sequences; [s, b, C] to be summed over ranks, and a bias.
            x: its input, in the phase ``first``: [s, b, C], of sequence parallelism this rank's
                part of the sequence.
            begin: ``PhaseMarker.begin``.

        Returns:
            What the branch adds, with the shape of ``x``, and its bias.
        """
        after = collective_phases(name, self.kind)[1]
        if self.kind == "all_reduce":
            (whole,) = begin(name, copy_to_tensor_model_parallel_region(x, group=self._group))
            output, bias = branch(whole)
            (output,) = begin(after, output)
            return reduce_from_tensor_model_parallel_region(output, group=self._group), bias
        (whole,) = begin(name, gather_from_sequence_parallel_region(x, group=self._group))
        output, bias = branch(whole)
        (output,) = begin(after, output)
        if output.requires_grad:
            output = _GatherAgain.apply(output, _Gathered(whole, x, self._group, self._lanes))
        return reduce_scatter_to_sequence_parallel_region(output, group=self._group), bias


class _Gathered:
    """A branch's whole input, which only weight gradients read again: dropped until then.

    As in Megatron's layer a rank keeps its part of the sequence, and gathers the others' again.
    """

    def __init__(self, whole: Tensor, part: Tensor, group: Any, lanes: Lanes) -> None:
        self._kept: tuple[Dropped, Tensor] | None = Dropped(whole), part.data
        self._group, self._lanes = group, lanes

    def gather(self) -> None:
        assert self._kept is not None, "a second backward"
        (dropped, part), self._kept = self._kept, None  # the memory goes with the weight gradient
        whole = dropped.restore()
        torch.distributed.all_gather_into_tensor(whole, part.contiguous(), group=self._group)
        # Either may be new memory, the part that of a rebuild.
        self._lanes.record(Lane.COMPUTE, whole)
        self._lanes.record(Lane.COMMUNICATION, part)


class _GatherAgain(torch.autograd.Function):
    """Its backward is in the phase after the branch: before the branch's own."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, gathered: _Gathered) -> Tensor:
        ctx.gathered = gathered
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.gathered.gather()
        return grad, None


def take_collectives(layers: Sequence[Any], lanes: Lanes) -> TensorCollectives | None:
    """Let the branches of a stage leave their collectives to the layers, from now on.

    Weight gradients that were computed beside the input's because of the gathered sequence are then
    computed by themselves (``split_linears``).

    Args:
        layers: of one stage; experts keep theirs.
        lanes: of this rank.

    Returns:
        None without tensor parallelism, and where modules are not megatron-core's own, whose
        collectives stay inside.
    """
    config = layers[0].config
    if config.tensor_model_parallel_size == 1:
        return None
    linears: list[Any] = []
    for branch in _branches(layers):
        column, row = _linears(branch)
        if not isinstance(column, ColumnParallelLinear) or not isinstance(row, RowParallelLinear):
            _LOGGER.info(
                "tensor parallelism's collectives stay on the compute lane, inside %s of %s and %s",
                *(type(module).__name__ for module in (branch, column, row)),
            )
            return None
        linears += [column, row]
    for linear in linears:
        before = splits(linear)
        linear.explicit_expert_comm = True
        if splits(linear) and not before:
            split_linear(linear)
    kind: Collectives = "sequence" if config.sequence_parallel else "all_reduce"
    return TensorCollectives(linears[0].tp_group, kind, lanes)


def _branches(layers: Sequence[Any]) -> Iterator[Any]:
    for layer in layers:
        yield layer.self_attention
        if not layer.is_moe_layer:
            yield layer.mlp


def _linears(branch: Any) -> tuple[Any, Any]:
    """The first and the last layer of a branch whose collectives are all theirs; else None."""
    if isinstance(branch, SelfAttention):
        return branch.linear_qkv, branch.linear_proj
    if isinstance(branch, MLP):
        return branch.linear_fc1, branch.linear_fc2
    return None, None
