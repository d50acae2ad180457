"""The executor with all ranks in one process: equal to a plain loop, and on time."""

import pytest
import torch
from helpers import stages
from torch import nn

from mhc_megatron.pipeline.actions import Transfer
from mhc_megatron.pipeline.catalogue import generate
from mhc_megatron.pipeline.costs import Costs, StageCosts
from mhc_megatron.pipeline.executor import (
    ExecutionError,
    GradientMade,
    OutputMade,
    Side,
    execute,
)
from mhc_megatron.pipeline.in_process import Exchange, InProcessTransport, run_ranks
from mhc_megatron.pipeline.lower import lower_rank
from mhc_megatron.pipeline.recompute import place_recompute
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.simulate import simulate
from mhc_megatron.pipeline.stage import AutogradStage

NAMES = ["gpipe", "one_f_one_b", "interleaved", "zb_h1", "dualpipe_v"]


def gradients(blocks: list[nn.Module]) -> list[torch.Tensor]:
    found = [parameter.grad for block in blocks for parameter in block.parameters()]
    assert all(gradient is not None for gradient in found)
    return found


def check(schedule: Schedule, seed: int) -> None:
    ours, theirs = (stages.modules(schedule.num_stages, seed) for _ in range(2))
    losses = stages.pipelined(schedule, ours, seed)
    expected = stages.serial(theirs, schedule.num_mb, seed)
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    # Every schedule here takes the backwards and weight gradients of a stage in the order of the
    # micro-batches, as the loop does: the sums are the same to the last bit.
    for a, b in zip(gradients(ours), gradients(theirs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", NAMES)
def test_four_ranks_equal_the_plain_loop(name: str, seed: int) -> None:
    num_mb = 8 + seed % 5 if name != "interleaved" else 4 * (1 + seed % 3)
    check(generate(name, num_ranks=4, num_mb=num_mb), seed)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_rebuilds_and_few_ranks(name: str, num_ranks: int) -> None:
    check(place_recompute(generate(name, num_ranks=num_ranks, num_mb=2 * num_ranks)), seed=7)


# Heterogeneous: the last stage has the loss.
COSTS = Costs(
    unit="ms",
    default=StageCosts(forward=8, dgrad=10, wgrad=6),
    stages={-1: StageCosts(forward=12, dgrad=14, wgrad=8)},
)


@pytest.mark.parametrize("name", ["one_f_one_b", "zb_h1", "dualpipe_v", "dualpipe"])
def test_the_simulator_foretells_the_step(name: str) -> None:
    schedule = generate(name, num_ranks=4, num_mb=10)
    simulated = simulate(schedule, COSTS)
    # Sleeps are never shorter than asked for, but a machine that is busy makes some of them longer:
    # one of a few tries is little disturbed.
    makespan = pytest.approx(simulated.makespan, rel=0.1)
    bubble = pytest.approx(simulated.bubble_fraction, abs=0.05)
    for _ in range(8):
        executed = stages.slept(schedule, COSTS)
        assert executed.makespan >= simulated.makespan
        if executed.makespan == makespan and executed.bubble_fraction == bubble:
            break
    assert executed.makespan == makespan
    assert executed.bubble_fraction == bubble


def test_an_error_shows_the_program() -> None:
    schedule = generate("zb_h1", num_ranks=2, num_mb=4)
    blocks = stages.modules(2, seed=0)
    held = stages.autograd_stages(blocks, seed=0)

    def refuse(mb: int, x: torch.Tensor | None) -> torch.Tensor:
        if mb == 2:
            raise ValueError("no more")
        return (blocks[1](x) ** 2).mean()

    held[1] = stages.AutogradStage(refuse)

    def rank(transport: InProcessTransport) -> None:
        execute(
            lower_rank(schedule, transport.rank),
            {transport.rank: held[transport.rank]},
            transport,
            num_stages=2,
            message=stages.message(),
        )

    with pytest.raises(ExecutionError) as caught:
        run_ranks(rank, 2)
    assert str(caught.value) == (
        "pipeline rank 1 failed at 1F2: ValueError: no more\n"
        "  (2 before) 1I0, send 1I0 to 0, recv 0F1 from 0, 1F1, 1I1, send 1I1 to 0, 1W0, "
        "recv 0F2 from 0, >>> 1F2 <<<, 1I2, send 1I2 to 0, 1W1, recv 0F3 from 0 (5 after)"
    )
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_profile_names_the_items() -> None:
    schedule = generate("zb_h1", num_ranks=1, num_mb=3)
    stage = stages.autograd_stages(stages.modules(1, seed=0), seed=0)
    program = lower_rank(schedule, 0)
    transport = InProcessTransport(Exchange(num_ranks=1), 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        execute(program, stage, transport, num_stages=1, message=stages.message())
    names = [event.name for event in sorted(profile.events(), key=lambda e: e.time_range.start)]
    items = [str(item) for item in program]
    assert [name for name in names if name in items] == items


def test_a_dropped_weight_gradient_is_found() -> None:
    schedule = generate("zb_h1", num_ranks=1, num_mb=3)
    stage = stages.autograd_stages(stages.modules(1, seed=0), seed=0)

    def rank(transport: InProcessTransport) -> None:
        program = lower_rank(schedule, 0)[:-1]
        execute(program, stage, transport, num_stages=1, message=stages.message())

    with pytest.raises(AssertionError, match=r"stage 0: unfinished \(2,\)"):
        run_ranks(rank, 1)


def test_a_message_of_another_shape_is_refused() -> None:
    schedule = generate("one_f_one_b", num_ranks=2, num_mb=2)
    held = stages.autograd_stages(stages.modules(2, seed=0), seed=0)
    held[0] = stages.AutogradStage(lambda mb, x: torch.zeros(2, 8, requires_grad=True) * 1)

    def rank(transport: InProcessTransport) -> None:
        program, stage = lower_rank(schedule, transport.rank), transport.rank
        message = stages.message()
        execute(program, {stage: held[stage]}, transport, num_stages=2, message=message)

    with pytest.raises(ExecutionError, match=r"failed at 0F0: ValueError: a message of \(\(2, 8\)"):
        run_ranks(rank, 2)


def test_a_message_that_does_not_come_is_named() -> None:
    schedule = generate("one_f_one_b", num_ranks=2, num_mb=2)

    def rank(transport: InProcessTransport) -> None:
        if transport.rank == 1:
            stage = stages.autograd_stages(stages.modules(2, seed=0), seed=0)[1]
            program = lower_rank(schedule, 1)
            message = stages.message()
            execute(program, {1: stage}, transport, num_stages=2, message=message)

    with pytest.raises(ExecutionError, match=r"rank 1 failed at recv 0F0 from 0: .*within 0.2 s"):
        run_ranks(rank, 2, timeout=0.2)


def test_a_rebuild_runs_at_its_place_in_the_schedule() -> None:
    """R of every micro-batch once, before its backward has the gradient."""
    calls: list[str] = []
    leaf = torch.ones(1, requires_grad=True)

    def forward(mb: int, x: torch.Tensor | None) -> torch.Tensor:
        calls.append(f"F{mb}")
        loss = leaf * (mb + 1)
        loss.register_hook(lambda gradient: calls.append(f"B{mb}"))
        return loss

    stage = AutogradStage(forward, rebuild=lambda mb: calls.append(f"R{mb}"))
    schedule = place_recompute(generate("one_f_one_b", num_ranks=1, num_mb=2))
    run_ranks(
        lambda transport: execute(
            lower_rank(schedule, 0), {0: stage}, transport, num_stages=1, message=stages.message()
        ),
        1,
    )
    assert calls == ["F0", "R0", "B0", "F1", "R1", "B1"]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("gradient_first", [False, True])
def test_messages_of_an_overlap_leave_when_they_are_made(gradient_first: bool, first: bool) -> None:
    """And in the first step, which loads kernels, after the Overlap."""
    schedule = generate("dualpipe_v", num_ranks=3, num_mb=6)
    ours, theirs = (stages.modules(6, seed=3) for _ in range(2))
    left: dict[str, set[int]] = {"output": set(), "gradient": set()}

    def rank(transport: InProcessTransport) -> None:
        every = stages.autograd_stages(ours, seed=3)
        own = {stage: every[stage] for stage in schedule.placement.stages_on(transport.rank)}
        sent: list[Transfer] = []
        send = transport.send

        def noting(transfer: Transfer, tensor: torch.Tensor) -> None:
            sent.append(transfer)
            send(transfer, tensor)

        def both(
            forward: Side, backward: Side, output_made: OutputMade, gradient_made: GradientMade
        ) -> None:
            def run_forward() -> None:
                before = len(sent)
                output_made(forward[0].forward(forward[1], forward[2]))
                left["output"].add(len(sent) - before)

            def run_backward() -> None:
                mb, grad = backward[1:]
                gradient = backward[0].backward(mb, grad, defer_weights=True)
                before = len(sent)
                gradient_made(gradient)
                left["gradient"].add(len(sent) - before)
                backward[0].weights(mb)

            sides = [run_forward, run_backward]
            for side in reversed(sides) if gradient_first else sides:
                side()

        transport.send = noting  # type: ignore[method-assign]
        program = lower_rank(schedule, transport.rank)
        execute(
            program,
            own,
            transport,
            num_stages=6,
            message=stages.message(),
            overlap=both,
            first=first,
        )
        expected = [item for item in program if isinstance(item, Transfer) and item.kind == "send"]
        for peer in range(3):
            assert [x for x in sent if x.peer == peer] == [x for x in expected if x.peer == peer]

    run_ranks(rank, 3)
    # A forward of the last stage is a loss, and one into the turn of the V stays on its rank. A
    # gradient that is made first waits for the output: both go to the same rank, in one order.
    assert left["gradient"] == ({0} if gradient_first or first else {0, 1})
    assert left["output"] == ({0} if first else {0, 2} if gradient_first else {0, 1})
    stages.serial(theirs, schedule.num_mb, 3)
    for a, b in zip(gradients(ours), gradients(theirs), strict=True):
        assert torch.equal(a, b)
