"""Tiny stages in whole numbers: sums are exact, so that their order does not enter the result."""

import torch
from torch import Tensor, nn

from mhc_megatron.pipeline.executor import execute
from mhc_megatron.pipeline.in_process import InProcessTransport, run_ranks
from mhc_megatron.pipeline.lower import lower_rank
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.stage import AutogradStage
from mhc_megatron.pipeline.transport import Message

_WIDTH, _BATCH, _TURN = 4, 2, 32
Outcome = tuple[list[float], list[list[Tensor]]]  # loss of every micro-batch; gradients by stage


class _Block(nn.Module):
    """A matrix product, a skip connection and a parameter used twice; remainders of _TURN."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.product = nn.Linear(_WIDTH, _WIDTH, dtype=torch.float64)
        self.gate = nn.Parameter(torch.empty(_WIDTH, dtype=torch.float64))
        for parameter in self.parameters():
            drawn = torch.randint(-1, 2, parameter.shape, generator=generator)
            parameter.data = drawn.double()

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.product(x * self.gate) + self.gate
        return (
            y - (_TURN * (y / _TURN).round()).detach()
        )  # the remainder, so that numbers stay small


def _blocks(num_stages: int) -> list[_Block]:
    generator = torch.Generator().manual_seed(num_stages)
    return [_Block(generator) for _ in range(num_stages)]


def _sample(mb: int) -> Tensor:
    generator = torch.Generator().manual_seed(mb)
    return torch.randint(-_TURN, _TURN, (_BATCH, _WIDTH), generator=generator).double()


def _loss(y: Tensor) -> Tensor:
    return (y * y).sum()


def _gradients(blocks: list[_Block]) -> list[list[Tensor]]:
    found = [[parameter.grad for parameter in block.parameters()] for block in blocks]
    for gradient in (gradient for block in found for gradient in block):
        assert gradient is not None and gradient.abs().max() < 2**50  # exact, and so are sums
    return found  # type: ignore[return-value]


def serial(num_stages: int, num_mb: int) -> Outcome:
    """A loop without a pipeline."""
    blocks, losses = _blocks(num_stages), []
    for mb in range(num_mb):
        x = _sample(mb)
        for block in blocks:
            x = block(x)
        loss = _loss(x)
        loss.backward()
        losses.append(loss.item())
    return losses, _gradients(blocks)


def executed(schedule: Schedule) -> Outcome:
    """The schedule over the in-process transport; every rank has its own copies of its stages.

    The gradients of a stage that two ranks hold are added up, as data parallelism does.
    """
    last = schedule.num_stages - 1

    def stage(number: int, block: _Block) -> AutogradStage:
        def function(mb: int, x: Tensor | None) -> Tensor:
            y = block(_sample(mb) if x is None else x)
            return _loss(y) if number == last else y

        return AutogradStage(function)

    cpu = torch.device("cpu")
    message = Message(shape=(_BATCH, _WIDTH), dtype=torch.float64, device=cpu)

    def rank(transport: InProcessTransport) -> tuple[dict[int, Tensor], dict[int, _Block]]:
        blocks = _blocks(schedule.num_stages)
        held = {number: blocks[number] for number in schedule.placement.stages_on(transport.rank)}
        outputs = execute(
            lower_rank(schedule, transport.rank),
            {number: stage(number, block) for number, block in held.items()},
            transport,
            num_stages=schedule.num_stages,
            message=message,
        )
        return outputs, held

    results = run_ranks(rank, schedule.num_ranks, timeout=20.0)
    losses = {mb: loss.item() for outputs, _ in results for mb, loss in outputs.items()}
    assert sorted(losses) == list(range(schedule.num_mb))
    gradients = []
    for number in range(schedule.num_stages):
        copies = _gradients([held[number] for _, held in results if number in held])
        gradients.append([sum(each[1:], each[0]) for each in zip(*copies, strict=True)])
    return [losses[mb] for mb in range(schedule.num_mb)], gradients


def equal(left: Outcome, right: Outcome) -> bool:
    """Whether all losses and all gradients are."""
    pairs = [
        pair for a, b in zip(left[1], right[1], strict=True) for pair in zip(a, b, strict=True)
    ]
    return left[0] == right[0] and all(torch.equal(a, b) for a, b in pairs)
