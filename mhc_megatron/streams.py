"""Entering and leaving the n-stream residual, in Megatron's [s, b, n*C] layout."""

import torch
from torch import Tensor, nn

from mhc_megatron import kernels
from mhc_megatron.config import Backend, MHCConfig
from mhc_megatron.precision import KeepFP32, float32_parameter


def expand_streams(hidden: Tensor, num_streams: int, *, backend: Backend = "auto") -> Tensor:
    """Copy one residual stream into n.

    Args:
        hidden: [s, b, C].
        num_streams: n.
        backend: of the kernels.

    Returns:
        [s, b, n*C], the same dtype.

    Raises:
        ValueError: ``backend="triton"`` cannot run here, and why.
    """
    return kernels.expand(hidden, num_streams=num_streams, backend=backend).flatten(-2)


def join_hidden(streams: Tensor, branch_input: Tensor) -> Tensor:
    """What single-pass stages send: [s, b, n*C] and the next branch's input [s, b, C] in one.

    The reader has neither the state nor the parameters that gave its H_pre; the product is enough,
    and it and its gradient have the streams' dtype in any case.

    Returns:
        [s, b, (n + 1)*C], the same dtype.
    """
    return torch.cat((streams, branch_input), dim=-1)


def split_hidden(hidden: Tensor, mhc: MHCConfig) -> tuple[Tensor, Tensor]:
    """The reverse of ``join_hidden``.

    Args:
        hidden: [s, b, (n + 1)*C].
        mhc: the number of streams.

    Returns:
        Contiguous streams [s, b, n*C] and branch input [s, b, C].
    """
    width = hidden.shape[-1] // mhc.hidden_parts
    streams, branch_input = hidden.split((mhc.num_streams * width, width), dim=-1)
    return streams.contiguous(), branch_input.contiguous()


class Contraction(KeepFP32):
    """The n residual streams made one again, before the final norm.

    ``mean``, ``sum`` and ``read`` have no parameters; ``learned`` is DeepSeek-V4's sigmoid head.
    Its start, zero weight and equal biases, is a uniform weighting whose scale the final norm
    removes.
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
        """[s, b, n*C], with ``single_pass`` [s, b, (n + 1)*C], to [s, b, C], the same dtype.

        By ``mhc.backend``, as ``HyperConnection``.
        """
        if self.mhc.variant == "single_pass":
            streams, last_read = split_hidden(streams, self.mhc)
            if self.mhc.contraction == "read":
                return last_read
        backend = self.mhc.backend
        streams = streams.unflatten(-1, (self.num_streams, -1))
        if self.mhc.contraction == "mean":
            return kernels.contract_mean(streams, backend=backend)
        if self.mhc.contraction == "sum":
            return kernels.contract_sum(streams, backend=backend)
        return kernels.contract_learned(
            streams,
            self.weight,
            self.scale,
            self.bias,
            rms_eps=self.mhc.rms_eps,
            eps=self.mhc.sinkhorn_eps,
            backend=backend,
        )
