"""Exchanges of tokens on one GPU, which has nobody to exchange them with: a copy and a wait."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mhc_megatron.megatron.chain import chain_of


class Wait:
    """What waits as long as an exchange takes.

    Args:
        sleep: waits for some seconds, on the current lane.
        gigabytes_per_second: of an exchange.
    """

    def __init__(self, sleep: Callable[[float], None], gigabytes_per_second: float) -> None:
        self._sleep, self._seconds_per_byte = sleep, 1e-9 / gigabytes_per_second
        self._left_out = False

    def __call__(self, tensor: Tensor) -> None:
        """For a tensor's exchange."""
        if not self._left_out:
            self._sleep(tensor.nbytes * self._seconds_per_byte)

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Exchanges that are launched, or captured, meanwhile are their copies alone."""
        self._left_out = True
        try:
            yield
        finally:
            self._left_out = False


class _Exchange(torch.autograd.Function):
    """A copy, then a wait on the same lane; in the backward too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, wait: Wait) -> Tensor:
        ctx.wait = wait
        wait(tensor)
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.wait(grad)
        return grad.clone(), None


def exchange(tensor: Tensor, wait: Wait) -> Tensor:
    """The tensor, after its exchange."""
    received: Tensor = _Exchange.apply(tensor, wait)
    return received


def wait_of(gigabytes_per_second: float, device: torch.device) -> Wait:
    """The wait of exchanges on a device.

    On a GPU it counts the multiprocessors' cycles: where their clock is lowered it takes longer.
    """
    if device.type != "cuda":
        return Wait(time.sleep, gigabytes_per_second)
    cycles = 10_000_000
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for event in (start, end):  # the first one loads the kernel
        torch.cuda._sleep(cycles)
        event.record()
    end.synchronize()
    per_second = cycles / start.elapsed_time(end) * 1e3
    return Wait(lambda seconds: torch.cuda._sleep(int(seconds * per_second)), gigabytes_per_second)


def let_exchange(chunk: torch.nn.Module, wait: Wait) -> None:
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
            return exchange(tokens, wait), probs

        def slow_combine(tokens: Tensor, *rest: Any, combine: Any = combine, **named: Any) -> Any:
            return exchange(combine(tokens, *rest, **named), wait)

        dispatcher.token_dispatch, dispatcher.token_combine = slow_dispatch, slow_combine
