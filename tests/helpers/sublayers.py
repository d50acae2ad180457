"""Sublayers without Megatron, one after the other, that tell a recompute what it may drop."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from mhc_megatron.branch_norm import BranchNorm
from mhc_megatron.hyper_connection import HyperConnection
from mhc_megatron.recompute import ForwardRecompute


def run_sublayers(
    streams: Tensor,
    sublayers: Iterable[tuple[HyperConnection, Any, Any]],
    dropping: ForwardRecompute | None,
    *,
    norms_inside: bool = False,
) -> Tensor:
    """[s, b, n*C] to the same.

    Args:
        streams: [s, b, n*C].
        sublayers: hyper-connection, norm and branch of each.
        dropping: told of every sublayer; None for nobody.
        norms_inside: the norms are BranchNorms that the hyper-connections apply.
    """
    for index, (connection, norm, branch) in enumerate(sublayers):
        inside: BranchNorm | None = norm if norms_inside else None
        branch_input, mix = connection.pre(streams, norm=inside)
        normed = branch_input if norms_inside else norm(branch_input)
        output = branch(normed)
        if dropping is not None:
            dropping.branch_done(
                index,
                streams=streams,
                branch_input=branch_input,
                normed=normed,
                norm=norm,
                output=output,
                bias=None,
                mix=mix,
            )
        before, streams = streams, connection.post(streams, output, mix)
        if dropping is not None:
            dropping.streams_done(index, streams=before, new_streams=streams)
    return streams
