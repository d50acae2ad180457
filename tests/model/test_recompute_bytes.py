"""What a stage keeps, and until when, is what the formulas of pipeline/memory.py say."""

from collections.abc import Callable

import pytest
import torch
from helpers.sublayers import run_sublayers
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mhc_megatron import recompute
from mhc_megatron.branch_norm import BranchNorm
from mhc_megatron.config import MHCConfig, Projection
from mhc_megatron.hyper_connection import HyperConnection
from mhc_megatron.pipeline.memory import StageSize
from mhc_megatron.pipeline.stage import AutogradStage
from mhc_megatron.recompute import ForwardRecompute, StreamRecompute

LAYERS, CHANNELS, TOKENS = 2, 16, 5


class Stage(nn.Module):
    """Linear branches under the kernels, whose norms the kernels apply or, ``apart``, do not."""

    def __init__(self, mhc: MHCConfig, dtype: torch.dtype, *, apart: bool = False) -> None:
        super().__init__()
        self.connections = nn.ModuleList(
            HyperConnection(mhc, hidden_size=CHANNELS, sublayer=index)
            for index in range(2 * LAYERS)
        )
        self.norms = nn.ModuleList(BranchNorm(CHANNELS) for _ in self.connections)
        self.branches = nn.ModuleList(
            nn.Linear(CHANNELS, CHANNELS, bias=False) for _ in self.connections
        )
        self.apart = apart
        for part in (self.norms, self.branches):
            part.to(dtype)

    def forward(self, streams: Tensor, dropping: ForwardRecompute | None = None) -> Tensor:
        sublayers = zip(self.connections, self.norms, self.branches, strict=True)
        return run_sublayers(streams, sublayers, dropping, norms_inside=not self.apart)


def size_of(mhc: MHCConfig, dtype: torch.dtype, block: int) -> StageSize:
    return StageSize(
        hidden=CHANNELS,
        seq=TOKENS,
        num_layers=LAYERS,
        streams=mhc.num_streams,
        recompute_block=block,
        branch_width=0,
        element_bytes=dtype.itemsize,
        logits=mhc.num_logits,
        phi_parts=2 if dtype == torch.bfloat16 else 0,
    )


def saved_by(function: Callable[[], Tensor], without: list[Tensor]) -> dict[torch.dtype, int]:
    """Bytes of the memory that a graph saves, by dtype, each counted once."""
    found: dict[int, tuple[torch.dtype, int]] = {}
    known = {tensor.untyped_storage()._cdata for tensor in without}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = tensor.dtype, storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    assert output.requires_grad
    total: dict[torch.dtype, int] = {}
    for dtype, size in found.values():
        total[dtype] = total.get(dtype, 0) + size
    return total


@pytest.mark.parametrize("projection", ["sinkhorn", "identity", "permutation"])
def test_coefficients_and_phi(projection: Projection) -> None:
    """In bf16 everything else is not float32; nothing is dropped."""
    mhc = MHCConfig(backend="triton", projection=projection, num_streams=3, sinkhorn_iterations=2)
    stage = Stage(mhc, torch.bfloat16)
    x = torch.randn(TOKENS, 1, 3 * CHANNELS, dtype=torch.bfloat16, requires_grad=True)
    saved = saved_by(lambda: stage(x), [*stage.parameters()])
    size = size_of(mhc, torch.bfloat16, 0)
    assert saved.pop(torch.float32) == size.coefficient_bytes
    # All states but the last, of each branch its input, which is normalised already, and its
    # output; and phi.
    width = 2 * LAYERS * (3 + 1 + 1)
    assert saved == {torch.bfloat16: TOKENS * CHANNELS * 2 * width + size.phi_bytes}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_phi_is_the_parameter_itself_in_other_precisions(dtype: torch.dtype) -> None:
    mhc = MHCConfig(backend="triton", num_streams=2, sinkhorn_iterations=2)
    stage = Stage(mhc, dtype)
    x = torch.randn(TOKENS, 1, 2 * CHANNELS, dtype=dtype, requires_grad=True)
    saved = saved_by(lambda: stage(x), [*stage.parameters()])
    size = size_of(mhc, dtype, 0)
    assert size.phi_bytes == 0
    width = 2 * LAYERS * (2 + 1 + 1)
    streams = TOKENS * CHANNELS * dtype.itemsize * width
    assert sum(saved.values()) == streams + size.coefficient_bytes


def dropped_bytes(dropped: list[recompute.Dropped]) -> int:
    return sum(one.alias.untyped_storage().nbytes() for one in dropped)


@pytest.mark.parametrize("block", [1, 3, 4])
def test_what_a_split_backward_keeps(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mhc = MHCConfig(
        backend="triton",
        num_streams=2,
        sinkhorn_iterations=2,
        recompute="block",
        recompute_block=block,
    )
    dropped: list[recompute.Dropped] = []
    most = 0
    initialise, rebuild = recompute.Dropped.__init__, recompute._Block.rebuild

    def watched(self: recompute.Dropped, tensor: Tensor) -> None:
        initialise(self, tensor)
        dropped.append(self)

    def measured(self: recompute._Block) -> None:
        nonlocal most
        rebuild(self)
        most = max(most, dropped_bytes(dropped))

    monkeypatch.setattr(recompute.Dropped, "__init__", watched)
    monkeypatch.setattr(recompute._Block, "rebuild", measured)
    module, handle = Stage(mhc, torch.float32, apart=True), StreamRecompute(mhc, num_sublayers=4)
    # A leaf that is no parameter is the input; the first state is a tensor of its own.
    stage = AutogradStage(lambda mb, x: module(x * 1.0, handle.begin()))
    x = torch.randn(TOKENS, 1, 2 * CHANNELS)
    output = stage.forward(0, x)
    size = size_of(mhc, torch.float32, block)
    assert dropped_bytes(dropped) == 0
    # The formula counts the state that a block starts from among the rebuilt ones as well.
    first = 2 * TOKENS * CHANNELS * 4
    stage.backward(0, torch.ones_like(output), defer_weights=True)
    assert most == size.split_rebuilt_bytes - first
    assert dropped_bytes(dropped) == size.wgrad_rebuilt_bytes
    stage.weights(0)
