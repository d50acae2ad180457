"""Weight gradients that modules queue by themselves, as Transformer Engine's do, end up in W."""

import queue
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mhc_megatron.errors import UserError
from mhc_megatron.megatron.delayed_wgrad import QueuedWeightGrads, delay_weight_gradients
from mhc_megatron.pipeline.stage import AutogradStage
from mhc_megatron.training.config import ParallelConfig, TrainConfig
from mhc_megatron.training.model import transformer_config

WIDTH, TOKENS = 8, 5


class _Product(torch.autograd.Function):
    """Transformer Engine's linear function, as far as its queue goes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, store: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.store = store
        return x @ weight.t() + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors

        def weight_gradient(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
            return grad.t() @ x, grad.sum(0)

        if ctx.store.context is None:
            return grad @ weight, *weight_gradient(x, grad), None
        ctx.store.context.put([[x, grad], weight_gradient])
        return grad @ weight, None, None, None


class Queueing(nn.Module):
    """A linear layer with the methods and the overwriting of Transformer Engine's."""

    def __init__(self, delay: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.wgrad_store = SimpleNamespace(context=queue.Queue() if delay else None)
        self.wgrad_accumulation_and_reduce_hooks: list[Callable[[], None]] = []

    def need_backward_dw(self) -> bool:
        return self.wgrad_store.context is not None

    def backward_dw(self) -> None:
        assert self.wgrad_store.context.qsize() > 0
        tensors, function = self.wgrad_store.context.get()
        self.weight.grad, bias = function(*tensors)
        if self.bias.grad is None:
            self.bias.grad = bias
        for hook in self.wgrad_accumulation_and_reduce_hooks:
            hook()

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight, self.bias, self.wgrad_store)


class _Products(torch.autograd.Function):
    """Two products of halves; queued, it returns the memory of weight gradients to come."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, store: Any, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.store = store
        return torch.cat([a @ w.t() for a, w in zip(x.chunk(2), weights, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        buffers = [torch.full_like(weight, torch.nan) for weight in weights]

        @torch.no_grad()
        def weight_gradients(x: Tensor, grad: Tensor) -> list[Tensor]:
            for a, g, out in zip(x.chunk(2), grad.chunk(2), buffers, strict=True):
                torch.mm(g.t(), a, out=out)
            return buffers

        if ctx.store.context is None:
            weight_gradients(x, grad)
        else:
            ctx.store.context.put([[x, grad], weight_gradients])
        both = zip(grad.chunk(2), weights, strict=True)
        return torch.cat([g @ w for g, w in both]), None, *buffers


class Grouped(nn.Module):
    """Experts, as Transformer Engine's GroupedLinear has them."""

    num_gemms = 2

    def __init__(self, delay: bool) -> None:
        super().__init__()
        self.weight0 = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.weight1 = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.wgrad_store = SimpleNamespace(context=queue.Queue() if delay else None)
        self.wgrad_accumulation_and_reduce_hooks: list[Callable[[], None]] = []

    def need_backward_dw(self) -> bool:
        return self.wgrad_store.context is not None

    def backward_dw(self) -> None:
        tensors, function = self.wgrad_store.context.get()
        self.weight0.grad, self.weight1.grad = function(*tensors)
        for hook in self.wgrad_accumulation_and_reduce_hooks:
            hook()

    def forward(self, x: Tensor) -> Tensor:
        return _Products.apply(x, self.wgrad_store, self.weight0, self.weight1)


class Chunk(nn.Module):
    """Two such layers, one of them used twice, one whose gradients autograd splits, and experts."""

    def __init__(self, delay: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.plain, self.last = (
            Queueing(delay),
            nn.Linear(WIDTH, WIDTH),
            Queueing(delay),
        )
        self.experts = Grouped(delay)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.plain(self.first(x.tanh()).tanh()).tanh() + self.first(x))
        return self.experts(x.tanh())


def stage_of(chunk: Chunk) -> AutogradStage:
    queued = QueuedWeightGrads(chunk)
    return AutogradStage(
        lambda mb, x: chunk(x), queued=queued.take if queued else None, name="stage"
    )


def run(chunk: Chunk, actions: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Gradients of the inputs, and of the parameters, after actions such as ``F0 I0 W0``."""
    stage, gradients = stage_of(chunk), []
    generator = torch.Generator().manual_seed(5)
    data = torch.randn(4, 2, TOKENS, WIDTH, generator=generator)
    for action in actions.split():
        mb = int(action[1:])
        if action[0] == "F":
            stage.forward(mb, data[mb, 0].clone())
        elif action[0] == "W":
            stage.weights(mb)
        else:
            gradients.append(stage.backward(mb, data[mb, 1], defer_weights=action[0] == "I"))
    assert not stage.unfinished
    return gradients, {name: p.grad for name, p in chunk.named_parameters()}


SERIAL = "F0 B0 F1 B1 F2 B2"


@pytest.mark.parametrize(
    "actions",
    [SERIAL, "F0 F1 I0 F2 I1 W0 I2 W1 W2", "F0 F1 F2 I0 I1 I2 W0 W1 W2", "F0 I0 W0 F1 F2 B1 I2 W2"],
)
def test_gradients_have_the_bits_of_an_undelayed_loop(actions: str) -> None:
    inputs, gradients = run(Chunk(delay=True), actions)
    same_inputs, same = run(Chunk(delay=False), SERIAL)
    assert all(map(torch.equal, inputs, same_inputs))
    assert all(torch.equal(gradients[name], same[name]) for name in same)


def test_nothing_is_computed_before_w() -> None:
    chunk = Chunk(delay=True)
    stage = stage_of(chunk)
    stage.forward(0, torch.randn(TOKENS, WIDTH))
    stage.backward(0, torch.randn(TOKENS, WIDTH), defer_weights=True)
    assert all(g is None or not g.any() for g in [p.grad for p in chunk.parameters()])
    assert chunk.first.wgrad_store.context.qsize() == 2
    stage.weights(0)
    assert all(parameter.grad is not None for parameter in chunk.parameters())
    assert chunk.first.wgrad_store.context.qsize() == 0


def test_the_hooks_of_ddp_take_every_gradient() -> None:
    """Megatron's: add it to main_grad, and leave nothing."""
    chunk = Chunk(delay=True)
    main: dict[Tensor, Tensor] = {}

    def taking(parameter: nn.Parameter) -> Callable[[], None]:
        def hook() -> None:
            assert parameter.grad is not None
            main[parameter] = main.get(parameter, 0) + parameter.grad
            parameter.grad = None

        return hook

    for module in (chunk.first, chunk.last, chunk.experts):
        module.wgrad_accumulation_and_reduce_hooks += [taking(p) for p in module.parameters()]
    run(chunk, "F0 F1 F2 I0 I1 W0 I2 W1 W2")
    _, same = run(Chunk(delay=False), SERIAL)
    names = {parameter: name for name, parameter in chunk.named_parameters()}
    assert {names[p] for p in main} == {n for n in same if not n.startswith("plain")}
    assert all(torch.allclose(total, same[names[p]]) for p, total in main.items())


def test_asking_at_every_step_leaves_one_hook() -> None:
    chunk = Chunk(delay=True)
    for _ in range(3):
        QueuedWeightGrads(chunk)
    assert len(chunk.experts.weight0._backward_hooks) == 1
    assert not chunk.first.weight._backward_hooks


def test_a_chunk_without_such_modules_queues_nothing() -> None:
    assert not QueuedWeightGrads(nn.Linear(2, 2))
    assert not QueuedWeightGrads(Chunk(delay=False))


def test_overlapped_communication_is_refused() -> None:
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2)
    delay_weight_gradients(config)
    assert config.delay_wgrad_compute
    config.tp_comm_overlap = True
    with pytest.raises(UserError, match=r"tp_comm_overlap=True .* a schedule without W"):
        delay_weight_gradients(config)


@pytest.mark.parametrize(
    ("schedule", "impl", "delays"),
    [
        ("zb_h1", "transformer_engine", True),
        ("dualpipe_v", "transformer_engine", True),
        ("one_f_one_b", "transformer_engine", False),
        ("zb_h1", "local", False),
    ],
)
def test_training_delays_where_the_schedule_has_a_w(schedule: Any, impl: Any, delays: bool) -> None:
    config = TrainConfig(
        parallel=ParallelConfig(pipeline=2, schedule=schedule),
        micro_batch_size=1,
        transformer_impl=impl,
    )
    assert transformer_config(config).delay_wgrad_compute == delays
