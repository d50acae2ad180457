"""Small stages for the executor, and the same model run serially."""

import torch
from torch import Tensor, nn

from mhc_megatron.pipeline.executor import execute
from mhc_megatron.pipeline.in_process import InProcessTransport, run_ranks
from mhc_megatron.pipeline.lower import lower_rank
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.stage import AutogradStage
from mhc_megatron.pipeline.transport import Message

WIDTH, BATCH = 8, 3


def modules(num_stages: int, seed: int) -> list[nn.Module]:
    """Stages with matrix products, a norm, a skip connection and a parameter used twice."""
    torch.manual_seed(seed)
    return [Block().double() for _ in range(num_stages)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.gate = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.gate.sigmoid() + self.down(self.up(self.norm(x)).tanh())
        return x + self.gate * x.cos()


def sample(mb: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + mb)
    return torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64)


def autograd_stages(blocks: list[nn.Module], seed: int) -> dict[int, AutogradStage]:
    """All stages; the first takes its sample, the last ends in a loss."""
    last = len(blocks) - 1

    def stage(number: int) -> AutogradStage:
        def function(mb: int, x: Tensor | None) -> Tensor:
            device = next(blocks[number].parameters()).device
            y = blocks[number](sample(mb, seed).to(device) if x is None else x)
            return (y * y).mean() if number == last else y

        return AutogradStage(function, name=f"stage {number}")

    return {number: stage(number) for number in range(len(blocks))}


def serial(blocks: list[nn.Module], num_mb: int, seed: int) -> list[Tensor]:
    """Losses of a plain loop; the gradients are in the blocks."""
    losses = []
    for mb in range(num_mb):
        x = sample(mb, seed).to(next(blocks[0].parameters()).device)
        for block in blocks:
            x = block(x)
        loss = (x * x).mean()
        loss.backward()
        losses.append(loss.detach())
    return losses


def message(device: torch.device = torch.device("cpu")) -> Message:
    return Message(shape=(BATCH, WIDTH), dtype=torch.float64, device=device)


def pipelined(
    schedule: Schedule, blocks: list[nn.Module], seed: int, device: torch.device | None = None
) -> list[Tensor]:
    """Losses of the schedule with all ranks in this process."""
    stages = autograd_stages(blocks, seed)

    def rank(transport: InProcessTransport) -> dict[int, Tensor]:
        held = schedule.placement.stages_on(transport.rank)
        return execute(
            lower_rank(schedule, transport.rank),
            {number: stages[number] for number in held},
            transport,
            num_stages=schedule.num_stages,
            message=message(device or torch.device("cpu")),
        )

    outputs = run_ranks(rank, schedule.num_ranks, device=device, timeout=20.0)
    losses = {mb: loss for output in outputs for mb, loss in output.items()}
    return [losses[mb] for mb in range(schedule.num_mb)]
