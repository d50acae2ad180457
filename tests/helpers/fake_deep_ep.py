"""DeepEP's names as far as Megatron's flex dispatcher uses them, over torch.distributed.

For a process that imports megatron-core afterwards: Megatron's own dispatcher then runs on a CPU.
Tokens go once to every rank that has one of their experts, as with DeepEP, and come back summed up
over these. What is asked of the arguments is asked. It shows nothing of DeepEP's kernels, its
stream, its buffers' sizes or its numbers, and the host waits in every call.
"""

import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from helpers import fake_engine


class EventHandle:
    """An event; what is on a CPU has happened."""


class EventOverlap:
    """An event that a call waits for, or ends with."""

    def __init__(self, event: EventHandle | None = None) -> None:
        self.event = event

    def current_stream_wait(self) -> None:
        assert self.event is not None, "an event of a call without async_finish"


class Config:
    """Sizes of a buffer that has none."""

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


@dataclass(frozen=True)
class Handle:
    """Which tokens went where; of a dispatch, for combines and for dispatches of other tensors.

    Attributes:
        rows: [sent], of the tokens in the order in which they were sent, by rank.
        sent, received: tokens, by rank.
        num_tokens: of this rank.
    """

    rows: Tensor
    sent: list[int]
    received: list[int]
    num_tokens: int


class Buffer:
    """Exchanges tokens within a group."""

    def __init__(
        self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0
    ) -> None:
        self.group = group
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def set_num_sms(number: int) -> None:
        assert number % 2 == 0

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return Config()

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Config()

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int, **how: Any
    ) -> tuple[Tensor, None, Tensor, Tensor, EventOverlap]:
        """Tokens by rank, tokens by expert, and which rank gets which token [tokens, ranks]."""
        assert topk_idx.dtype == torch.int64 and topk_idx.is_contiguous()
        num_ranks = self.group.size()
        ones = topk_idx.new_zeros(len(topk_idx), num_experts + 1, dtype=torch.int32)
        ones.scatter_(1, topk_idx % (num_experts + 1), 1)  # -1, for no expert, is the last
        by_expert = ones[:, :-1]
        goes = by_expert.view(len(topk_idx), num_ranks, -1).any(-1)
        counts = goes.sum(0, dtype=torch.int32), by_expert.sum(0, dtype=torch.int32)
        return counts[0], None, counts[1], goes, _after(how)

    def dispatch(
        self,
        x: Tensor,
        handle: Handle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        **how: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, list[int] | None, Handle | None, EventOverlap]:
        """Tokens of all ranks for this one's experts, which are numbered from 0; -1 for others."""
        _check_tokens(x)
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            return self._exchange(x[handle.rows], handle), None, None, None, None, _after(how)
        assert topk_idx is not None and topk_weights is not None and is_token_in_rank is not None
        assert num_tokens_per_rank is not None and num_tokens_per_expert is not None
        assert topk_weights.dtype == torch.float32 and topk_weights.shape == topk_idx.shape
        received = torch.empty_like(num_tokens_per_rank)
        dist.all_to_all_single(received, num_tokens_per_rank, group=self.group)
        ranks, rows = is_token_in_rank.t().nonzero(as_tuple=True)
        sent = num_tokens_per_rank.tolist()
        handle = Handle(rows, sent, received.tolist(), len(x))
        per_rank = len(num_tokens_per_expert) // self.group.size()
        indices = topk_idx[rows] - ranks[:, None] * per_rank
        elsewhere = (topk_idx[rows] < 0) | (indices < 0) | (indices >= per_rank)
        indices = self._exchange(indices.masked_fill(elsewhere, -1), handle)
        weights = self._exchange(topk_weights[rows].masked_fill(elsewhere, 0.0), handle)
        by_expert = [int((indices == expert).sum()) for expert in range(per_rank)]
        return self._exchange(x[rows], handle), indices, weights, by_expert, handle, _after(how)

    def combine(
        self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None, **how: Any
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """The sums of what came of every token of this rank, in the order of the ranks."""
        _check_tokens(x)
        weights = None
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32
            weights = self._sum(topk_weights, handle)
        return self._sum(x, handle), weights, _after(how)

    def _exchange(self, rows: Tensor, handle: Handle) -> Tensor:
        got = rows.new_empty(sum(handle.received), *rows.shape[1:])
        dist.all_to_all_single(got, rows, handle.received, handle.sent, group=self.group)
        return got

    def _sum(self, rows: Tensor, handle: Handle) -> Tensor:
        got = rows.new_empty(sum(handle.sent), *rows.shape[1:])
        back = rows.contiguous()
        dist.all_to_all_single(got, back, handle.sent, handle.received, group=self.group)
        sums = rows.new_zeros(handle.num_tokens, *rows.shape[1:], dtype=torch.float32)
        return sums.index_add_(0, handle.rows, got.float()).to(rows.dtype)


def _check_tokens(x: Tensor) -> None:
    assert x.dim() == 2 and x.is_contiguous() and x.dtype == torch.bfloat16


def _after(how: dict[str, Any]) -> EventOverlap:
    """The event of a call."""
    if how.get("allocate_on_comm_stream"):
        assert how["previous_event"] is not None and how["async_finish"]
    return EventOverlap(EventHandle() if how.get("async_finish") else None)


def install() -> None:
    """Let this process's ``import deep_ep`` find the stand-in, and training do without its GPU."""
    assert "megatron.core.transformer.moe.fused_a2a" not in sys.modules, "it has looked already"
    package, utils = (ModuleType(name) for name in ("deep_ep", "deep_ep.utils"))
    for module in (package, utils):
        module.__spec__ = ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    package.Buffer = Buffer  # type: ignore[attr-defined]
    utils.EventHandle, utils.EventOverlap = EventHandle, EventOverlap  # type: ignore[attr-defined]
    mock.patch("mhc_megatron.training.runtime.require_deep_ep").start()
    # Megatron compiles this dispatcher's functions, for a GPU.
    torch.compiler.set_stance("force_eager")


def install_with_engine() -> None:
    """Also the stand-in for Transformer Engine, without which older cores have no MoE layers."""
    fake_engine.install()
    install()
