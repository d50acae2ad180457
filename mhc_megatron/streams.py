"""Entering and leaving the n-stream residual, in Megatron's [s, b, n*C] layout."""

import torch
from torch import Tensor, nn

from mhc_megatron import kernels
from mhc_megatron.config import MHCConfig
from mhc_megatron.precision import KeepFP32, float32_parameter


def expand_streams(hidden: Tensor, num_streams: int) -> Tensor:
    """Copy one residual stream into n.

    Args:
        hidden: [s, b, C].
        num_streams: n.

    Returns:
        [s, b, n*C], the same dtype.
    """
    return kernels.expand(hidden, num_streams=num_streams).flatten(-2)


class Contraction(KeepFP32):
    """The n residual streams made one again, before the final norm.

    ``mean`` and ``sum`` have no parameters; ``learned`` is DeepSeek-V4's sigmoid head. Its start,
    zero weight and equal biases, is a uniform weighting whose scale the final norm removes.
    """

    def __init__(self, mhc: MHCConfig, *, hidden_size: int) -> None:
        super().__init__()
        self.mhc = mhc
        self.num_streams = mhc.num_streams
        if mhc.contraction == "learned":
            width = mhc.num_streams * hidden_size
            self.weight = nn.Parameter(torch.zeros(mhc.num_streams, width, dtype=torch.float32))
            self.scale = float32_parameter(1, fill=mhc.init_gate)
            self.bias = float32_parameter(mhc.num_streams)

    def forward(self, streams: Tensor) -> Tensor:
        """[s, b, n*C] to [s, b, C], the same dtype."""
        streams = streams.unflatten(-1, (self.num_streams, -1))
        if self.mhc.contraction == "mean":
            return kernels.contract_mean(streams)
        if self.mhc.contraction == "sum":
            return kernels.contract_sum(streams)
        return kernels.contract_learned(
            streams,
            self.weight,
            self.scale,
            self.bias,
            rms_eps=self.mhc.rms_eps,
            eps=self.mhc.sinkhorn_eps,
        )
