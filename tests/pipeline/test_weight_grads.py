"""A backward in two halves: which gradients wait, and that none is lost or counted twice."""

from typing import Any

import pytest
import torch
from helpers import stages
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from mhc_megatron.pipeline.weight_grads import WeightGrads


def whole(block: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    x = x.clone().requires_grad_()
    block(x).backward(grad)
    gradients = [parameter.grad for parameter in block.parameters()]
    block.zero_grad()
    return x.grad, gradients


def test_every_gradient_is_that_of_the_whole_backward() -> None:
    block, x, grad = stages.modules(1, 3)[0], torch.randn(3, 8).double(), torch.randn(3, 8).double()
    expected_x, expected = whole(block, x, grad)
    x.requires_grad_()
    work = WeightGrads(get_gradient_edge(block(x)), x)
    work.backward(grad)
    assert torch.equal(x.grad, expected_x)
    waiting = {name for name, parameter in block.named_parameters() if parameter.grad is None}
    # The gate is used at two nodes of the spine, so it cannot be cut off at one.
    assert waiting == {"norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight"}
    work.finish()
    for parameter, gradient in zip(block.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_without_an_input_the_furthest_parameters_do_not_wait() -> None:
    embedding, linear = nn.Embedding(5, 8), nn.Linear(8, 8)
    loss = linear(embedding(torch.arange(5))).sin().sum()
    work = WeightGrads(get_gradient_edge(loss), None)
    work.backward(torch.ones_like(loss))
    assert embedding.weight.grad is not None and linear.weight.grad is None
    work.finish()
    found = [embedding.weight.grad, linear.weight.grad, linear.bias.grad]
    parameters = [embedding.weight, linear.weight, linear.bias]
    loss = linear(embedding(torch.arange(5))).sin().sum()
    for a, b in zip(found, torch.autograd.grad(loss, parameters), strict=True):
        assert torch.equal(a, b)


class Product(torch.autograd.Function):
    """Both gradients in one backward."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        Product.calls += 1
        x, weight = ctx.saved_tensors
        return grad @ weight.t(), x.t() @ grad


def test_a_function_with_its_own_weight_runs_once() -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    y = Product.apply(x, weight).sin()
    before = Product.calls
    work = WeightGrads(get_gradient_edge(y), x)
    work.backward(torch.ones_like(y))
    work.finish()
    assert Product.calls == before + 1 and weight.grad is not None
    assert work.unsplit == "every parameter's gradient is computed with the input's"


def test_hooks_fire_once_per_micro_batch() -> None:
    """As DDP's, which add every gradient to a buffer."""
    block, count = stages.modules(1, 3)[0], dict.fromkeys(range(6), 0)
    kept = []
    for index, parameter in enumerate(block.parameters()):
        node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]

        def fired(*_: object, index: int = index) -> None:
            count[index] += 1

        node.register_hook(fired)
        kept.append(node)
    for _ in range(2):
        x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
        y = block(x)
        work = WeightGrads(get_gradient_edge(y), x)
        work.backward(torch.ones_like(y))
        work.finish()
    assert set(count.values()) == {2}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    block, x, grad = stages.modules(1, 3)[0], torch.randn(3, 8).double(), torch.randn(3, 8).double()
    expected_x, expected = whole(block, x, grad)
    x.requires_grad_()
    work = WeightGrads(get_gradient_edge(checkpoint(block, x, use_reentrant=reentrant)), x)
    work.backward(grad)
    if reentrant:
        assert work.unsplit == "activation checkpoints run their whole backward at once"
    work.finish()
    assert torch.equal(x.grad, expected_x)
    for parameter, gradient in zip(block.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)
