"""Memory and time of the recompute policies, and the kernel that rebuilds a block.

    python benchmarks/recompute.py --results benchmarks/results/h100

One stage of hyper-connections whose branches do almost nothing, so that the streams dominate.
Allocated bytes are read in the backward when a state's gradient arrives, which is right after a
block's rebuild; their maximum is compared with the formula. The rebuild's kernel is timed against
its least bytes at a copy's bandwidth. A stage with real attention and FFN is timed with and without
recompute. A stress run compares bits over many steps while another stream takes and returns memory.
Appends to ``<results>/recompute_memory.jsonl`` and ``recompute_time.jsonl`` (format:
benchmarks/README.md), of which recompute_table.py makes tables and a picture.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from provenance import append, provenance
from timing import copy_bandwidth, graph_times, kernel_profile
from torch import Tensor, nn

from mhc_megatron import kernels
from mhc_megatron.branch_norm import BranchNorm
from mhc_megatron.config import MHCConfig
from mhc_megatron.hyper_connection import HyperConnection, normalises
from mhc_megatron.pipeline.blocks import best_block, peak_width
from mhc_megatron.recompute import ForwardRecompute, StreamRecompute
from mhc_megatron.report.gpu_kinds import mhc_kernel_names

BLOCKS = (1, 2, 4, 6, 8, 16)
KERNEL_BLOCKS = (1, 2, 4, 6, 8)
PARTS = ("memory", "kernel", "step", "stress")
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


def begin(mhc: MHCConfig, size: Size) -> ForwardRecompute | None:
    """The recompute of one forward under the policy."""
    if mhc.recompute == "none":
        return None
    return StreamRecompute(mhc, num_sublayers=size.sublayers).begin()


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


def memory_lines(size: Size) -> Iterator[dict[str, Any]]:
    """Activations under each policy, and the peak of the whole step, gradients included."""
    base, n = MHCConfig(num_streams=size.streams), size.streams
    stage, x = Stage(size, base, lambda index: Scale(size.channels)), inputs(size)
    unit = x.numel() // n * x.element_size()
    # Not in the formula: a sublayer's branch output, and float32 coefficients, logits and RMS.
    constant = unit + size.tokens * 4 * (2 * n * (n + 2) + 2)
    samples: list[int] = []
    before = 0

    def sample(index: int) -> None:
        # The gradients of the state and of the next branch's input have arrived; the loss's is one
        # number.
        gradients = (n + 1) * unit if index + 1 < size.sublayers else 0
        held = torch.cuda.memory_allocated() - before - gradients - (index + 1) * constant
        samples.append(held + x.numel() * x.element_size())  # the first state was there before

    for name, mhc in policies(base, size).items():
        block = mhc.block_of(size.sublayers)
        stage(x, begin(mhc, size)).sum().backward()  # parameters' gradients exist from here on
        torch.cuda.synchronize()
        samples.clear()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        stage(x, begin(mhc, size), sample).sum().backward()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        floor = unit * peak_width(num_sublayers=size.sublayers, num_streams=n, block=block)
        for metric, value, limit in (
            ("activations", max(samples), floor),
            ("step_peak", peak, floor + size.sublayers * constant),
        ):
            yield {
                "benchmark": "recompute_memory",
                "impl": f"mhc_megatron.{name}",
                "shape": {**shape(size), "block": block},
                "metric": metric,
                "value": value,
                "unit": "bytes",
                "floor": limit,
                "ratio_to_floor": round(value / limit, 4),
            }


def kernel_lines(size: Size, bandwidth: float) -> Iterator[dict[str, Any]]:
    """The rebuild of one block by CUDA-graph replay, over three sets of operands."""
    n, channels = size.streams, size.channels
    for block in KERNEL_BLOCKS:
        elements = n * block + 2 * block - 1  # read x, f; write x' and u
        least = size.tokens * (channels * 2 * elements + 4 * (n * (n + 2) * block - n * (n + 1)))
        floor = least / bandwidth * 1e6
        for name, has_norms in (("rebuild", False), ("rebuild with norms", True)):
            calls = [rebuild_call(size, block, seed, has_norms) for seed in range(3)]
            times = graph_times(calls)
            yield {
                "benchmark": "recompute_time",
                "impl": f"mhc_megatron.{name}",
                "shape": {**shape(size), "L": block},
                "metric": "rebuild",
                "value": round(times.median, 2),
                "spread": [round(times.least, 2), round(times.most, 2)],
                "unit": "us",
                "floor": round(floor, 2),
                "ratio_to_floor": round(times.median / floor, 3),
                "launch": "graph",
            }


def rebuild_call(size: Size, block: int, seed: int, has_norms: bool) -> Callable[[], object]:
    """A rebuild with operands of its own, each sublayer's coefficients among them."""
    n, channels = size.streams, size.channels
    x = inputs(size, seed).detach().unflatten(-1, (n, -1))
    connection = HyperConnection(MHCConfig(num_streams=n), hidden_size=channels, sublayer=0)
    norm = BranchNorm(channels).to(size.device, x.dtype) if has_norms else None
    with torch.no_grad():
        _, mix = connection.to(size.device).pre(x.flatten(-2), norm=norm)
    assert isinstance(mix, kernels.PackedMappings)
    mixes = [
        kernels.PackedMappings(
            mix.packed.clone(),
            n,
            mix.tokens,
            inverse_rms=None if mix.inverse_rms is None else mix.inverse_rms.clone(),
        )
        for _ in range(block)
    ]
    branches = [torch.randn_like(x[..., 0, :]) for _ in range(block - 1)]
    norms = [None if norm is None else norm.weight.data] * block
    out = kernels.rebuild(x, branches, mixes, norm_weights=norms)
    return lambda: kernels.rebuild(x, branches, mixes, norm_weights=norms, out=out)


def step_lines(size: Size, repetitions: int) -> Iterator[dict[str, Any]]:
    """Forward and backward of a stage with attention and FFN, policies taking turns.

    Launched kernel by kernel, and as one CUDA graph; then the kernels of a profile.
    """
    base = MHCConfig(num_streams=size.streams)

    def branch(index: int) -> nn.Module:
        return FeedForward(size.channels) if index % 2 else Attention(size.channels)

    stage, x = Stage(size, base, branch, norm=BranchNorm), inputs(size)
    variants = {"none": base, "auto": replace(base, recompute="auto")}
    eager: dict[str, list[float]] = defaultdict(list)
    for repetition in range(repetitions + 2):  # the first two warm up
        for name, mhc in variants.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            stage(x, begin(mhc, size)).sum().backward()
            stop.record()
            stop.synchronize()
            if repetition > 1:
                eager[name].append(start.elapsed_time(stop))
    graphs: dict[str, list[float]] = defaultdict(list)
    for _ in range(4):
        for name, mhc in variants.items():
            step = graph_times(
                [lambda mhc=mhc: stage(x, begin(mhc, size)).sum().backward()],
                repetitions=repetitions,
            )
            graphs[name].append(step.median / 1e3)
    for launch, times in (("eager", eager), ("graph", graphs)):
        base_time = statistics.median(times["none"])
        for name, found in times.items():
            yield {
                "benchmark": "recompute_time",
                "impl": f"mhc_megatron.{name}",
                "shape": shape(size),
                "metric": "step",
                "value": round(statistics.median(found), 3),
                "spread": [round(min(found), 3), round(max(found), 3)],
                "unit": "ms",
                "floor": round(base_time, 3),
                "ratio_to_floor": round(statistics.median(found) / base_time, 4),
                "launch": launch,
            }
    profiles = {
        name: kernel_profile(lambda mhc=mhc: stage(x, begin(mhc, size)).sum().backward())
        for name, mhc in variants.items()
    }
    base_profile = profiles["none"]
    total = sum(base_profile.values())
    if not total:
        print("the profiler sees no kernels here: their times are left out", file=sys.stderr)
        return
    for name, profile in profiles.items():
        more = {k: round(ms - base_profile.get(k, 0.0), 3) for k, ms in profile.items()}
        yield {
            "benchmark": "recompute_time",
            "impl": f"mhc_megatron.{name}",
            "shape": shape(size),
            "metric": "step_kernels",
            "value": round(sum(profile.values()), 3),
            "unit": "ms",
            "hyper_connections": round(sum(profile.get(k, 0.0) for k in mhc_kernel_names()), 3),
            "more": {k: ms for k, ms in more.items() if abs(ms) > 0.02},
            "floor": round(total, 3),
            "ratio_to_floor": round(sum(profile.values()) / total, 4),
        }


def gradients_of(stage: Stage, x: Tensor, recompute: ForwardRecompute | None) -> list[Tensor]:
    """Every gradient of one step."""
    leaves = [x, *stage.parameters()]
    for leaf in leaves:
        leaf.grad = None
    stage(x, recompute).square().mean().backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def stress_line(size: Size, steps: int) -> dict[str, Any]:
    """Steps whose gradients differ in any bit from those without recompute."""
    base = MHCConfig(num_streams=size.streams)
    stage = Stage(size, base, lambda index: FeedForward(size.channels), norm=BranchNorm)
    x = inputs(size)
    expected = [gradient.clone() for gradient in gradients_of(stage, x, None)]
    chosen = list(policies(base, size).values())[1:]
    on_gpu = size.device == "cuda"
    other = torch.cuda.Stream() if on_gpu else None
    wrong = 0
    for step in range(steps):
        if other is not None:  # memory comes and goes, and is written, beside the step
            with torch.cuda.stream(other):
                for part in range(4):
                    torch.full(
                        (size.tokens * size.channels * (1 + part),), torch.nan, device="cuda"
                    )
            if step % 50 == 0:
                torch.cuda.empty_cache()
        found = gradients_of(stage, x, begin(chosen[step % len(chosen)], size))
        wrong += not all(map(torch.equal, found, expected))
    return {
        "benchmark": "recompute_memory",
        "impl": "mhc_megatron.all_policies",
        "shape": shape(size),
        "metric": "steps_with_another_bit",
        "value": wrong,
        "unit": "steps",
        "steps": steps,
        "floor": 0,
        "deterministic": not wrong,
    }


def shape(size: Size) -> dict[str, int]:
    """For a result line."""
    return {"T": size.tokens, "C": size.channels, "n": size.streams, "L": size.sublayers}


def main() -> int:
    """Measure, append and draw; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="results folder")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--channels", type=int, default=2560)
    parser.add_argument("--sublayers", type=int, default=60)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--stress-steps", type=int, default=500)
    parser.add_argument("--commit", help="the code measured (default: git's HEAD)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: needs a GPU", file=sys.stderr)
        return 2
    source = provenance(args.commit)
    size = Size(tokens=args.tokens, channels=args.channels, sublayers=args.sublayers)
    bandwidth = copy_bandwidth()
    small = replace(size, tokens=512, channels=512, sublayers=12)
    lines = {
        "memory": memory_lines(size),
        "kernel": kernel_lines(size, bandwidth),
        "step": step_lines(replace(size, sublayers=min(12, args.sublayers)), args.repetitions),
        "stress": map(stress_line, [small], [args.stress_steps]),
    }
    found = []
    args.results.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        for line in lines[part]:
            found.append(line)
            append(args.results, line, source)
            ratio = f"{line['ratio_to_floor']:.4f} x floor" if line["floor"] else ""
            print(
                f"{line['impl']:<24} {line['metric']:<24} L={line['shape']['L']:<3}"
                f"{line['value']:>16,} {line['unit']:<6}{ratio}",
                flush=True,
            )
        torch.cuda.empty_cache()
    blocks = [line for line in found if line["metric"] == "activations" and line["shape"]["block"]]
    if blocks:
        best = best_block(num_sublayers=size.sublayers, num_streams=size.streams)
        lowest = min(blocks, key=lambda line: line["value"])["shape"]["block"]
        print(f"lowest measured at block {lowest}, predicted {best}")
    return int(any(line.get("deterministic") is False for line in found))


if __name__ == "__main__":
    sys.exit(main())
