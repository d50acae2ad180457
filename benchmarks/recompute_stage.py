"""One stage of hyper-connections for the recompute benchmarks, without Megatron."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mhc_megatron.branch_norm import BranchNorm
from mhc_megatron.config import MHCConfig
from mhc_megatron.hyper_connection import HyperConnection, Observer, normalises
from mhc_megatron.recompute import ForwardRecompute, StreamRecompute

BLOCKS = (1, 2, 4, 6, 8, 16)
HEAD = 128


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of one stage: T tokens, C channels, L sublayers, n streams."""

    tokens: int
    channels: int
    sublayers: int
    streams: int = 4
    device: str = "cuda"


class Scale(nn.Module):
    """A branch that keeps its input, as a linear layer does, and computes nearly nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, C] to the same."""
        return x * self.weight


class Attention(nn.Module):
    """Causal attention with heads of 128."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, C] to the same."""
        s, b, channels = x.shape
        heads = self.qkv(x).view(s, b, 3, channels // HEAD, HEAD).permute(2, 1, 3, 0, 4)
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        return self.out(mixed.permute(2, 0, 1, 3).reshape(s, b, channels))


class FeedForward(nn.Module):
    """SwiGLU of width 8/3 C, rounded up to a multiple of 128."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = -(-8 * channels // (3 * HEAD)) * HEAD
        self.gate_up = nn.Linear(channels, 2 * width, bias=False)
        self.down = nn.Linear(width, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, C] to the same."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


class Stage(nn.Module):
    """Sublayers as ``MHCTransformerLayer`` runs them, one chain.

    Args:
        size: of the stage.
        mhc: of its hyper-connections.
        branch: makes the branch of a sublayer.
        norm: of the branches. The kernels apply a ``BranchNorm``; the input of any other is kept
            before and after it, as the formula has it.
    """

    def __init__(
        self,
        size: Size,
        mhc: MHCConfig,
        branch: Callable[[int], nn.Module],
        *,
        norm: type[nn.RMSNorm] = nn.RMSNorm,
    ) -> None:
        super().__init__()
        self.connections = nn.ModuleList(
            HyperConnection(mhc, hidden_size=size.channels, sublayer=index)
            for index in range(size.sublayers)
        )
        self.norms = nn.ModuleList(norm(size.channels, eps=1e-5) for _ in range(size.sublayers))
        self.branches = nn.ModuleList(branch(index) for index in range(size.sublayers))
        for module in (self.norms, self.branches):
            module.to(torch.bfloat16)
        self.to(size.device)
        generator = torch.Generator().manual_seed(0)
        for connection in self.connections:
            for parameter in connection.parameters():
                scale = 0.02 if parameter.dim() > 1 else 0.5
                noise = torch.randn(parameter.shape, generator=generator) * scale
                with torch.no_grad():
                    parameter.add_(noise.to(size.device))

    def forward(
        self,
        streams: Tensor,
        recompute: ForwardRecompute | None,
        sample: Callable[[int], None] | None = None,
    ) -> Tensor:
        """[s, b, n*C] to the same; ``sample`` gets a sublayer when the backward is about to enter
        it, after a rebuild there."""
        branch_input, mix = self.connections[0].pre(streams, norm=self._inside(0))
        for index, connection in enumerate(self.connections):
            normed = branch_input if normalises(mix) else self.norms[index](branch_input)
            output = self.branches[index](normed)
            if recompute is not None:
                recompute.branch_done(
                    index,
                    streams=streams,
                    branch_input=branch_input,
                    normed=normed,
                    norm=self.norms[index],
                    output=output,
                    bias=None,
                    mix=mix,
                )
            before = streams
            if index + 1 < len(self.connections):
                following = self.connections[index + 1]
                norm = self._inside(index + 1)
                streams, branch_input, mix = connection.post_pre(
                    streams, output, mix, following, norm=norm
                )
            else:
                streams = connection.post(streams, output, mix)
            del normed, output
            if recompute is not None:
                recompute.streams_done(index, streams=before, new_streams=streams)
            del before
            if sample is not None:
                streams.grad_fn.register_prehook(lambda *_, index=index: sample(index))
        return streams

    def _inside(self, index: int) -> BranchNorm | None:
        norm = self.norms[index]
        return norm if isinstance(norm, BranchNorm) else None


def begin(mhc: MHCConfig, size: Size, observer: Observer | None = None) -> ForwardRecompute | None:
    """The recompute of one forward under the policy; ``observer`` runs its rebuilds."""
    if mhc.recompute == "none":
        return None
    recompute = StreamRecompute(mhc, num_sublayers=size.sublayers)
    recompute.observer = observer
    return recompute.begin()


def inputs(size: Size, seed: int = 1) -> Tensor:
    """Streams [T, 1, n*C] that want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size.tokens, 1, size.streams * size.channels, generator=generator)
    return x.to(size.device, torch.bfloat16).requires_grad_()


def policies(base: MHCConfig, size: Size) -> dict[str, MHCConfig]:
    """By name: none, the blocks that fit, and auto."""
    blocks = [block for block in BLOCKS if block <= size.sublayers]
    return {
        "none": base,
        **{f"block({b})": replace(base, recompute="block", recompute_block=b) for b in blocks},
        "auto": replace(base, recompute="auto"),
    }


def shape(size: Size) -> dict[str, int]:
    """For a result line."""
    return {"T": size.tokens, "C": size.channels, "n": size.streams, "L": size.sublayers}
