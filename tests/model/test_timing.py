"""What a timer of hyper-connections counts, and that it changes no bit."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mhc_megatron import timing
from mhc_megatron.config import MHCConfig
from mhc_megatron.hyper_connection import HyperConnection, Observer
from mhc_megatron.timing import HyperConnectionTimer


class Clock:
    """Goes on by what ``slow`` was told, and by nothing else."""

    def __init__(self) -> None:
        self.now = 0.0

    def slow(self, x: Tensor, *, forward: float, backward: float) -> Tensor:
        clock = self

        class Slow(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                clock.now += forward
                return 2 * x

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                clock.now += backward
                return 2 * gradient

        return Slow.apply(x)


class Event:
    """A CUDA event of a GPU whose clock is ``clock``; its time is known once it was waited for."""

    def __init__(self, clock: Clock, *, enable_timing: bool) -> None:
        assert enable_timing
        self.clock, self.waited_for = clock, False

    def record(self) -> None:
        self.time = self.clock.now

    def synchronize(self) -> None:
        self.waited_for = True

    def elapsed_time(self, stop: "Event") -> float:
        assert stop.waited_for
        return 1e3 * (stop.time - self.time)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(timing.torch.cuda, "Event", partial(Event, clock))
    return clock


@pytest.mark.parametrize("on_gpu", [False, True], ids=["host's clock", "events"])
def test_a_kernel_counts_and_a_branch_does_not(clock: Clock, on_gpu: bool) -> None:
    """Two kernels around a branch, the second of several nodes."""
    timer = HyperConnectionTimer(on_gpu=on_gpu)
    x = torch.ones(3, requires_grad=True)
    x = clock.slow(x, forward=100, backward=100)
    x = timer.kernel(clock.slow, x, forward=1, backward=2)
    x = clock.slow(x, forward=100, backward=100)
    x = timer.kernel(
        lambda x: (clock.slow(clock.slow(x, forward=4, backward=8), forward=16, backward=32),), x
    )[0]
    x = clock.slow(x, forward=100, backward=100)
    assert timer.milliseconds() == {"forward": 21e3}
    x.sum().backward()
    assert timer.milliseconds() == {"forward": 21e3, "backward": 42e3}


def test_a_rebuild_counts_by_itself(clock: Clock) -> None:
    timer = HyperConnectionTimer(on_gpu=False)

    def rebuild(seconds: float) -> None:
        clock.now += seconds

    timer.rebuild(rebuild, 3.0)
    assert timer.milliseconds() == {"rebuild": 3e3}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("variant", ["two_pass", "single_pass"])
def test_every_gradient_is_the_same_to_the_last_bit(backend: str, variant: str) -> None:
    def gradients(observer: Observer | None) -> list[Tensor]:
        torch.manual_seed(0)
        mhc = MHCConfig(num_streams=2, backend=backend, variant=variant)  # type: ignore[arg-type]
        first, second = (HyperConnection(mhc, hidden_size=8, sublayer=i) for i in range(2))
        parameters = [*first.parameters(), *second.parameters()]
        for parameter in parameters:
            torch.nn.init.normal_(parameter)
        first.observer = second.observer = observer
        leaf = torch.randn(2, 1, 16, requires_grad=True)
        branch_input, mix = first.pre(leaf)
        streams, branch_input, mix = first.post_pre(leaf, branch_input.tanh(), mix, second)
        streams = second.post(streams, branch_input.tanh(), mix)
        if variant == "single_pass":
            streams = streams + second.read(streams, mix).repeat(1, 1, 2)
        streams.square().sum().backward()
        return [tensor.grad for tensor in (leaf, *parameters) if tensor.grad is not None]

    timer = HyperConnectionTimer(on_gpu=False)
    plain, timed = gradients(None), gradients(timer.kernel)
    assert len(plain) == len(timed) == 11
    assert all(map(torch.equal, plain, timed))
    assert all(value > 0 for value in timer.milliseconds().values())
    assert list(timer.milliseconds()) == ["forward", "backward"]
