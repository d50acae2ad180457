"""Exchanges of tokens on one GPU, which has nobody to exchange them with: a copy and a wait."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mhc_megatron.megatron.chain import chain_of


class _Exchange(torch.autograd.Function):
    """A copy, then a wait on the same lane; in the backward too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, wait: Callable[[Tensor], None]) -> Tensor:
        ctx.wait = wait
        wait(tensor)
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.wait(grad)
        return grad.clone(), None


def exchange_of(gigabytes_per_second: float, device: torch.device) -> Callable[[Tensor], None]:
    """What waits as long as a tensor's exchange takes."""
    if device.type != "cuda":
        return lambda tensor: time.sleep(tensor.nbytes / gigabytes_per_second / 1e9)
    cycles = 10_000_000
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for event in (start, end):  # the first one loads the kernel
        torch.cuda._sleep(cycles)
        event.record()
    end.synchronize()
    per_second = cycles / start.elapsed_time(end) * 1e3
    return lambda tensor: torch.cuda._sleep(
        int(tensor.nbytes / gigabytes_per_second / 1e9 * per_second)
    )


def let_exchange(chunk: torch.nn.Module, wait: Callable[[Tensor], None]) -> None:
    """Each dispatch and combine of a chunk's tokens, which have nowhere to go, takes its time."""
    chain = chain_of(chunk)
    assert chain is not None
    for layer in chain.layers:
        if not layer.is_moe_layer:
            continue
        dispatcher: Any = layer.mlp.token_dispatcher
        dispatch, combine = dispatcher.token_dispatch, dispatcher.token_combine

        def slow_dispatch(tokens: Tensor, probs: Tensor, dispatch: Any = dispatch) -> Any:
            tokens, probs = dispatch(tokens, probs)
            return _Exchange.apply(tokens, wait), probs

        def slow_combine(tokens: Tensor, *rest: Any, combine: Any = combine, **named: Any) -> Any:
            return _Exchange.apply(combine(tokens, *rest, **named), wait)

        dispatcher.token_dispatch, dispatcher.token_combine = slow_dispatch, slow_combine
