"""Forward and backward in turns: the bits of one after the other under any valid plan."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.plans import random_plan
from torch import Tensor, nn

from mhc_megatron.errors import UserError
from mhc_megatron.megatron.overlap import LaneOverlap, PhasedStage
from mhc_megatron.megatron.phases import Lanes, PhaseMarker
from mhc_megatron.pipeline.interleave import interleave
from mhc_megatron.pipeline.phases import Phase, Plan, Step

LAYERS = 3


def ignore(_: Tensor | None) -> None:
    """Of what an Overlap makes."""


NAMES = [name for _ in range(LAYERS) for name in ("attention", "mlp")]
PHASES = (Phase("enter"), *(Phase(name, layer=i // 2) for i, name in enumerate(NAMES)))


class Chunk(nn.Module):
    """A residual chain of products, which logs what runs when."""

    def __init__(self, seed: int, log: list[str]) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.products = nn.ModuleList(nn.Linear(6, 6) for _ in NAMES)
        self.marker = PhaseMarker(PHASES, Lanes(torch.device("cpu")), rebuilds_ahead=False)
        self.log, self.fails_at = log, -1

    def run(self, mb: int, x: Tensor | None) -> Tensor:
        assert x is not None
        self.marker.start()
        streams = x * 1.5
        self._note(0, streams)
        for place, (name, product) in enumerate(zip(NAMES, self.products, strict=True), start=1):
            if place == self.fails_at:
                raise ArithmeticError(f"the forward of {place}")
            (branch,) = self.marker.begin(name, streams.tanh(), used=(streams,))
            branch = product(branch)
            self._note(place, branch)
            streams = streams + branch
        self.marker.end(streams)
        return streams

    def _note(self, place: int, output: Tensor) -> None:
        self.log.append(f"F{place}")
        output.register_hook(lambda _: self.log.append(f"B{place}"))

    def stage(self) -> PhasedStage:
        return PhasedStage(self.run, self.marker, take_dropped=None)


def inputs(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 6, generator=generator) for _ in range(3)]


def gradients(chunks: list[Chunk]) -> list[Tensor]:
    return [parameter.grad for chunk in chunks for parameter in chunk.parameters()]  # type: ignore[misc]


def run(planner: Callable[..., Plan] | None, seed: int) -> tuple[list[Tensor], list[str]]:
    """F of one chunk, beside B of another that has run its forward; then the first's B."""
    log: list[str] = []
    chunks = [Chunk(0, log), Chunk(1, log)]
    first, second = (chunk.stage() for chunk in chunks)
    x, other, grad = inputs(seed)
    second.forward(0, other)
    log.clear()
    made: list[Tensor] = []
    into: Tensor | None = None
    if planner is None:
        made.append(first.forward(1, x))
        into = second.backward(0, grad, defer_weights=False)
    else:

        def gradient_made(gradient: Tensor | None) -> None:
            nonlocal into
            into = gradient
            log.append("gradient")

        overlap = LaneOverlap(chunks[0].marker.lanes, planner)
        overlap((first, 1, x), (second, 0, grad), made.append, gradient_made)
    order = list(dict.fromkeys(log))  # W comes by the product again
    last = first.backward(1, grad, defer_weights=False)
    assert into is not None and last is not None
    assert not first.unfinished and not second.unfinished
    return [made[0], into, last, *gradients(chunks)], order


def test_any_plan_gives_the_same_bits() -> None:
    for seed in range(200):
        expected, _ = run(None, seed)
        found, order = run(random_plan(seed), seed)
        assert all(gradient.abs().sum() > 0 for gradient in expected)
        assert all(map(torch.equal, found, expected)), (seed, order)


def in_order(plan: Plan) -> Iterator[str]:
    """F and B, and the gradient directly after its last B: before all that is left of F and W."""
    for step in plan:
        if step.op in "FB":
            yield f"{step.op}{step.phase}"
        if step == Step("B", 0):
            yield "gradient"


def test_the_two_run_in_the_plans_order() -> None:
    for seed in range(20):
        plan = random_plan(seed)(PHASES, PHASES, rebuild=False)
        _, order = run(random_plan(seed), seed)
        assert order == [*in_order(plan)]
    _, order = run(interleave, 0)
    turns = [a[0] != b[0] for a, b in itertools.pairwise(order)]
    assert sum(turns) >= LAYERS, "the planner takes turns"


def test_a_failed_forward_ends_the_backward_and_is_what_is_raised() -> None:
    chunks = [Chunk(0, []), Chunk(1, [])]
    chunks[0].fails_at = 3
    first, second = (chunk.stage() for chunk in chunks)
    x, other, grad = inputs(0)
    second.forward(0, other)
    overlap = LaneOverlap(chunks[0].marker.lanes)
    with pytest.raises(ArithmeticError, match="the forward of 3"):
        overlap((first, 1, x), (second, 0, grad), ignore, ignore)


def test_a_failed_backward_ends_the_forward_and_is_what_is_raised() -> None:
    chunks = [Chunk(0, []), Chunk(1, [])]
    first, second = (chunk.stage() for chunk in chunks)
    x, other, _ = inputs(0)
    second.forward(0, other)
    overlap = LaneOverlap(chunks[0].marker.lanes)
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        overlap((first, 1, x), (second, 0, torch.zeros(3)), ignore, ignore)


def test_a_layer_that_runs_another_phase_is_named() -> None:
    marker = PhaseMarker(PHASES, Lanes(torch.device("cpu")), rebuilds_ahead=False)
    marker.start()
    with pytest.raises(UserError, match=r"the phase mlp begins where 0\.attention was planned"):
        marker.begin("mlp", torch.zeros(1))
    marker.start()
    with pytest.raises(UserError, match=r"ended in the phase enter, before 2\.mlp"):
        marker.end(torch.zeros(1))
