"""Small stages for the executor, and the same model run serially."""

import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mhc_megatron.pipeline.catalogue import generate
from mhc_megatron.pipeline.costs import Costs
from mhc_megatron.pipeline.distributed import DistributedTransport
from mhc_megatron.pipeline.executor import ExecutionError, execute
from mhc_megatron.pipeline.in_process import InProcessTransport, run_ranks
from mhc_megatron.pipeline.lower import lower_rank
from mhc_megatron.pipeline.measure import Spans, timeline_of
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.stage import AutogradStage
from mhc_megatron.pipeline.stopwatch import HostStopwatch
from mhc_megatron.pipeline.timeline import Timeline
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


def message(device: torch.device | None = None) -> Message:
    cpu = torch.device("cpu")
    return Message(shape=(BATCH, WIDTH), dtype=torch.float64, device=device or cpu)


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
            message=message(device),
        )

    outputs = run_ranks(rank, schedule.num_ranks, device=device, timeout=20.0)
    losses = {mb: loss for output in outputs for mb, loss in output.items()}
    return [losses[mb] for mb in range(schedule.num_mb)]


class SleepingStage:
    """Takes the times of a cost table, in ms, and computes nothing."""

    def __init__(self, costs: Costs, number: int, num_stages: int, result: Tensor) -> None:
        self._costs, self._result = costs.of_stages(num_stages)[number], result
        self._is_first = number == 0

    def forward(self, mb: int, x: Tensor | None) -> Tensor:
        _sleep(self._costs.forward)
        return self._result

    def backward(self, mb: int, grad: Tensor | None, *, defer_weights: bool) -> Tensor | None:
        _sleep(self._costs.dgrad if defer_weights else self._costs.whole_backward)
        return None if self._is_first else self._result

    def weights(self, mb: int) -> None:
        _sleep(self._costs.wgrad)

    def recompute(self, mb: int) -> None:
        _sleep(self._costs.recompute)

    @property
    def unfinished(self) -> tuple[int, ...]:
        return ()


def _sleep(milliseconds: float) -> None:
    if milliseconds:
        time.sleep(milliseconds / 1e3)


def slept(schedule: Schedule, costs: Costs) -> Timeline:
    """The executed timeline of stages that sleep."""
    what = message()
    result = torch.zeros(what.shape, dtype=what.dtype)

    def rank(transport: InProcessTransport) -> Spans:
        watch = HostStopwatch()
        held = schedule.placement.stages_on(transport.rank)
        execute(
            lower_rank(schedule, transport.rank),
            {s: SleepingStage(costs, s, schedule.num_stages, result) for s in held},
            transport,
            num_stages=schedule.num_stages,
            message=what,
            stopwatch=watch,
        )
        return watch.spans()

    return timeline_of(schedule, run_ranks(rank, schedule.num_ranks))


_PAUSES = {"hangs": 60.0, "stalls": 9.0}  # seconds: longer than the tests wait, and not so long


class _Fails(SleepingStage):
    """Dies, hangs or stalls in the forward of micro-batch 3."""

    def __init__(self, how: str, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._how = how

    def forward(self, mb: int, x: Tensor | None) -> Tensor:
        if mb == 3 and self._how == "dies":
            os._exit(7)
        if mb == 3:
            time.sleep(_PAUSES.get(self._how, 0.0))
        return super().forward(mb, x)


def with_failing_rank(rank: int, world_size: int, how: str, seconds: float) -> None:
    """A step over gloo in which rank 1 fails; a job for the worker pool."""
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        schedule = generate("zb_h1", num_ranks=world_size, num_mb=8)
        cpu = torch.device("cpu")
        timeout = timedelta(seconds=seconds)
        transport = DistributedTransport(schedule, range(world_size), device=cpu, timeout=timeout)
        what = message()
        place = (Costs(), rank, world_size, torch.zeros(what.shape, dtype=what.dtype))
        stage = _Fails(how, *place) if rank == 1 else SleepingStage(*place)
        start = time.monotonic()
        try:
            execute(
                lower_rank(schedule, rank),
                {rank: stage},
                transport,
                num_stages=world_size,
                message=what,
            )
        except ExecutionError:
            print(f"failed after {time.monotonic() - start:.1f} s", file=sys.stderr)
            raise
    finally:
        dist.destroy_process_group()


def failing_process(
    rank: int, world_size: int, port: int, how: str, seconds: float, errors: str
) -> None:
    """``with_failing_rank`` as a process of its own, whose stderr goes to the file ``errors``."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with open(errors, "w") as file:
        os.dup2(file.fileno(), 2)
    with_failing_rank(rank, world_size, how, seconds)
