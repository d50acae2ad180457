"""Blocks of Transformer Engine without Megatron: the bits of recompute, and FP8 near bf16."""

import contextlib
from typing import Any

import pytest
import torch
from helpers import engine
from helpers.layouts import randomise
from torch import Tensor

from mhc_megatron.config import MHCConfig
from mhc_megatron.te_block import BlockConfig, TEStack

CONFIG = BlockConfig(
    hidden_size=256, ffn_hidden_size=512, num_attention_heads=4, num_query_groups=2
)
RECIPES = {
    None: "",
    "delayed": "DelayedScaling",
    "tensorwise": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
}


def fp8(recipe: str | None) -> Any:
    """Transformer Engine's context; nothing for bf16."""
    if recipe is None:
        return contextlib.nullcontext()
    from transformer_engine.common import recipe as recipes
    from transformer_engine.pytorch import fp8_autocast

    return fp8_autocast(enabled=True, fp8_recipe=getattr(recipes, RECIPES[recipe])())


def run(recipe: str | None, mhc: MHCConfig) -> list[Tensor]:
    """Output and gradients of the second of two steps: delayed scaling then has a history."""
    engine.forget()
    torch.manual_seed(0)
    stack = TEStack(CONFIG, mhc, num_layers=3)
    randomise([stack], seed=1)
    hidden = torch.randn(128, 2, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    leaves = [hidden, *stack.parameters()]
    found: list[Tensor] = []
    for step in range(2):
        with fp8(recipe):
            out = stack(hidden, is_first_microbatch=step == 0)
        found = [out, *torch.autograd.grad(out.float().square().mean(), leaves)]
    return found


@pytest.mark.parametrize("recipe", list(RECIPES), ids=str)
def test_recompute_leaves_every_bit(recipe: str | None) -> None:
    expected = run(recipe, MHCConfig(backend="triton"))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in expected)
    for policy in ({"recompute": "auto"}, {"recompute": "stage"}):
        found = run(recipe, MHCConfig(backend="triton", **policy))  # type: ignore[arg-type]
        assert all(map(torch.equal, found, expected)), policy


@pytest.mark.parametrize("recipe", list(RECIPES)[1:])
def test_fp8_is_near_bf16_and_not_bf16(recipe: str) -> None:
    plain, rounded = run(None, MHCConfig())[0], run(recipe, MHCConfig())[0]
    error = (rounded.float() - plain.float()).norm() / plain.float().norm()
    # e4m3 keeps three bits of mantissa: products of rounded numbers are off by a few percent.
    assert 1e-4 < float(error) < 0.1


def test_a_captured_stack_has_the_bits_of_eager_calls() -> None:
    """Forward and backward as CUDA graphs: blocks, hyper-connections and both ends."""
    torch.manual_seed(0)
    stack = TEStack(CONFIG, MHCConfig(backend="triton"), num_layers=2)
    randomise([stack], seed=1)
    shape = (128, 2, 256)
    sample, hidden = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2)
    )

    def run(call: Any) -> list[Tensor]:
        stack.zero_grad(set_to_none=True)
        hidden.grad = None
        out = call(hidden)
        out.float().square().mean().backward()
        return [
            out.detach().clone(),
            *(leaf.grad.clone() for leaf in (hidden, *stack.parameters())),
        ]

    expected = run(stack)
    captured = torch.cuda.make_graphed_callables(stack, (sample,))
    for _ in range(2):
        assert all(map(torch.equal, run(captured), expected))
