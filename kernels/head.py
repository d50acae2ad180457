"""Into the n streams and out of them, by the fastest implementation or the one asked for.

reference.py defines these functions; ``backend`` is that of functional.py.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mhc_megatron.kernels import checks, reference
from mhc_megatron.kernels.backends import Backend, choose_backend
from mhc_megatron.kernels.tracing import traced

if TYPE_CHECKING:
    from mhc_megatron.kernels.triton.head_tiles import HeadTiles


def expand(
    hidden: Tensor,
    *,
    num_streams: int,
    backend: Backend = "auto",
    tiles: "HeadTiles | None" = None,
) -> Tensor:
    """Copy one residual stream into n; the gradient is summed in float32, stream 0 first.

    Args:
        hidden: [..., C]; memory that is not contiguous is copied for the kernels.
        num_streams: n.
        backend: "auto", "triton" or "reference".
        tiles: of the kernels; None for the table of kernels/triton/head_tiles.py.

    Returns:
        [..., n, C], the same dtype, in memory of its own.

    Raises:
        ValueError: an argument does not fit, or ``backend="triton"`` cannot run.
    """
    checks.check_hidden(hidden, num_streams)
    rows = hidden.contiguous()
    choice = choose_backend(rows.unsqueeze(-2), num_streams=num_streams, backend=backend)
    if choice.name == "reference":
        return reference.expand(hidden, num_streams=num_streams)
    if traced(rows, tiles):
        from mhc_megatron.kernels import head_operators

        return head_operators.expand(rows, num_streams, 1)
    from mhc_megatron.kernels.head_functions import Expand

    return Expand.apply(rows, num_streams, tiles or _tiles(num_streams, rows.dtype))


def contract_mean(
    streams: Tensor, *, backend: Backend = "auto", tiles: "HeadTiles | None" = None
) -> Tensor:
    """The mean of the streams, the inverse of ``expand``.

    Args:
        streams: [..., n, C].
        backend, tiles: as for ``expand``.

    Returns:
        [..., C] in the streams' dtype; the mean is taken in float32 (float64 for float64).

    Raises:
        ValueError: as ``expand``.
    """
    return _contract(streams, True, backend, tiles)


def contract_sum(
    streams: Tensor, *, backend: Backend = "auto", tiles: "HeadTiles | None" = None
) -> Tensor:
    """The sum of the streams, as in hyper-connections; a norm must follow to remove the factor n.

    Args:
        streams: [..., n, C].
        backend, tiles: as for ``expand``.

    Returns:
        [..., C] in the streams' dtype; the sum is taken in float32 (float64 for float64).

    Raises:
        ValueError: as ``expand``.
    """
    return _contract(streams, False, backend, tiles)


def contract_learned(
    streams: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    rms_eps: float,
    eps: float,
    backend: Backend = "auto",
    tiles: "HeadTiles | None" = None,
) -> Tensor:
    """DeepSeek-V4's ``hc_head``: a sum of the streams weighted by a sigmoid of the token.

    Args:
        streams: [..., n, C], any floating dtype.
        weight: [n, n*C], V4's ``hc_head_fn``; float32 for the kernels, as ``scale`` and ``bias``.
        scale: [1], V4's ``hc_head_scale``.
        bias: [n], V4's ``hc_head_base``.
        rms_eps: added to the mean square of the n*C vector, inside the square root.
        eps: added to the weights, V4's ``hc_eps``.
        backend, tiles: as for ``expand``.

    Returns:
        [..., C] in the streams' dtype; the sum is taken in float32 (float64 for float64).

    Raises:
        ValueError: as ``expand``.
    """
    checks.check_streams(streams)
    checks.check_head(streams, weight, scale, bias)
    if choose_backend(streams, backend=backend).name == "reference":
        return reference.contract_learned(streams, weight, scale, bias, rms_eps=rms_eps, eps=eps)
    checks.check_kernel_operands(weight=weight, scale=scale, bias=bias)
    if traced(streams, tiles):
        from mhc_megatron.kernels import head_operators

        hidden, _ = head_operators.contract_learned(streams, weight, scale, bias, rms_eps, eps)
        return hidden
    from mhc_megatron.kernels.head_functions import ContractLearned

    tiles = tiles or _tiles(streams.shape[-2], streams.dtype)
    return ContractLearned.apply(streams, weight, scale, bias, rms_eps, eps, tiles)


def _contract(streams: Tensor, mean: bool, backend: Backend, tiles: "HeadTiles | None") -> Tensor:
    """``contract_mean`` or ``contract_sum``."""
    checks.check_streams(streams)
    if choose_backend(streams, backend=backend).name == "reference":
        return reference.contract_mean(streams) if mean else reference.contract_sum(streams)
    divisor = streams.shape[-2] if mean else 1
    if traced(streams, tiles):
        from mhc_megatron.kernels import head_operators

        return head_operators.contract(streams, divisor)
    from mhc_megatron.kernels.head_functions import Contract

    return Contract.apply(streams, divisor, tiles or _tiles(streams.shape[-2], streams.dtype))


def _tiles(num_streams: int, dtype: torch.dtype) -> "HeadTiles":
    from mhc_megatron.kernels.triton.head_tiles import default_head_tiles

    return default_head_tiles(num_streams, dtype)
