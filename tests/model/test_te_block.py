"""Blocks without Megatron, on modules in plain torch under Transformer Engine's names."""

import builtins
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.layouts import randomise
from torch import Tensor, nn

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.te_block import BlockConfig, TEBlock, TEStack

CHANNELS, HEADS, LAYERS, TOKENS, BATCH = 16, 2, 3, 6, 2
CONFIG = BlockConfig(
    hidden_size=CHANNELS,
    ffn_hidden_size=24,
    num_attention_heads=HEADS,
    params_dtype=torch.float32,
    device="cpu",
)
MHC = MHCConfig(backend="reference")


class MultiheadAttention(nn.Module):
    """The arguments that a block gives Transformer Engine's, and what it computes with them."""

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        *,
        num_gqa_groups: int | None,
        attention_dropout: float,
        layernorm_epsilon: float,
        layer_number: int,
        attn_mask_type: str,
        input_layernorm: bool,
        fuse_qkv_params: bool,
        bias: bool,
        normalization: str,
        params_dtype: torch.dtype,
        device: str,
    ) -> None:
        super().__init__()
        assert (num_gqa_groups, attention_dropout, attn_mask_type) == (None, 0.0, "causal")
        assert input_layernorm and fuse_qkv_params and not bias and normalization == "RMSNorm"
        self.layer_number, self.heads = layer_number, num_attention_heads
        self.norm = nn.RMSNorm(hidden_size, eps=layernorm_epsilon)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.projection = nn.Linear(hidden_size, hidden_size, bias=False)
        self.to(device=device, dtype=params_dtype)

    def forward(
        self,
        x: Tensor,
        *,
        is_first_microbatch: bool | None = None,
        rotary_pos_emb: Tensor | None = None,
    ) -> Tensor:
        self.first = is_first_microbatch
        if rotary_pos_emb is not None:
            x = x + rotary_pos_emb
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).permute(1, 2, 0, 3)
            for part in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.projection(out.permute(2, 0, 1, 3).flatten(-2))


class LayerNormMLP(nn.Module):
    """As above."""

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        *,
        eps: float,
        activation: str,
        bias: bool,
        normalization: str,
        params_dtype: torch.dtype,
        device: str,
    ) -> None:
        super().__init__()
        assert activation == "swiglu" and not bias and normalization == "RMSNorm"
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self.fc1 = nn.Linear(hidden_size, 2 * ffn_hidden_size, bias=False)
        self.fc2 = nn.Linear(ffn_hidden_size, hidden_size, bias=False)
        self.to(device=device, dtype=params_dtype)

    def forward(self, x: Tensor, *, is_first_microbatch: bool | None = None) -> Tensor:
        self.first = is_first_microbatch
        gate, up = self.fc1(self.norm(x)).chunk(2, dim=-1)
        return self.fc2(nn.functional.silu(gate) * up)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """``transformer_engine.pytorch`` with the two modules."""
    package, pytorch = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    vars(pytorch).update(MultiheadAttention=MultiheadAttention, LayerNormMLP=LayerNormMLP)
    vars(package).update(pytorch=pytorch)
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", pytorch)


def stack(mhc: MHCConfig = MHC, *, drawn: bool = True) -> TEStack:
    torch.manual_seed(0)
    made = TEStack(CONFIG, mhc, num_layers=LAYERS)
    if drawn:
        randomise([made], seed=1)
    return made


def embedding() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(TOKENS, BATCH, CHANNELS, generator=generator, requires_grad=True)


def gradients(made: TEStack, hidden: Tensor, **arguments: Any) -> dict[str, Tensor]:
    """The output as ``out``, and the gradients of the input and of all parameters."""
    out = made(hidden, **arguments)
    leaves = {"hidden": hidden, **dict(made.named_parameters())}
    found = torch.autograd.grad(out.square().sum(), list(leaves.values()))
    return {"out": out.detach(), **dict(zip(leaves, found, strict=True))}


@pytest.mark.usefixtures("engine")
def test_at_the_start_it_is_the_plain_residual_network() -> None:
    made, hidden = stack(drawn=False), embedding()
    expected: Tensor = hidden
    for block in made.blocks:
        expected = expected + block.attention(expected)
        expected = expected + block.mlp(expected)
    # Sums of four equal streams in float32.
    assert torch.allclose(made(hidden), expected, atol=1e-5)


@pytest.mark.usefixtures("engine")
def test_blocks_that_hand_over_are_blocks_by_themselves() -> None:
    made, hidden = stack(), embedding()
    streams = hidden.repeat(1, 1, MHC.num_streams)
    for block in made.blocks:
        streams = block(streams)
    assert torch.equal(made(hidden), made.contraction(streams))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    "policy", [{"recompute": "auto"}, {"recompute": "block", "recompute_block": 4}], ids=str
)
def test_recompute_leaves_every_bit(policy: dict[str, Any]) -> None:
    hidden = embedding()
    expected = gradients(stack(), hidden)
    dropping = stack(MHCConfig(backend="reference", **policy))
    found = gradients(dropping, hidden)
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with torch.no_grad():
        assert torch.equal(dropping(hidden), expected["out"])


@pytest.mark.usefixtures("engine")
def test_branches_get_their_arguments() -> None:
    made, hidden = stack(), embedding()
    rotated = made(hidden, rotary_pos_emb=torch.ones(CHANNELS), is_first_microbatch=True)
    assert not torch.equal(rotated, made(hidden, is_first_microbatch=True))
    block = made.blocks[1]
    assert isinstance(block, TEBlock)
    assert (block.attention.layer_number, block.attention.first, block.mlp.first) == (2, True, True)
    assert block.mlp_hyper_connection.sublayer == 3


@pytest.mark.usefixtures("engine")
def test_half_precision_leaves_the_hyper_connections_alone() -> None:
    made = stack().bfloat16()
    kinds = {name: p.dtype for name, p in made.named_parameters()}
    assert {kinds[name] for name in kinds if "hyper_connection" in name} == {torch.float32}
    assert {kinds[name] for name in kinds if "hyper_connection" not in name} == {torch.bfloat16}
    assert made(embedding().bfloat16()).dtype == torch.bfloat16


@pytest.mark.usefixtures("engine")
def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UserError, match="variant='single_pass' is for Megatron's layers"):
        TEBlock(CONFIG, MHCConfig(variant="single_pass"), index=0)
    with pytest.raises(UserError, match="recompute_block=7"):
        stack(MHCConfig(recompute="block", recompute_block=7))


def test_without_transformer_engine_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = builtins.__import__

    def missing(name: str, *arguments: Any) -> Any:
        if name.startswith("transformer_engine"):
            raise ImportError(name)
        return found(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match="install transformer-engine"):
        TEBlock(CONFIG, MHC, index=0)
