"""One small model, in one process, of Transformer Engine's modules: its losses and gradients.

For tests/gpu. ``IMPL`` is what the model is made of; local modules on a CPU rehearse the tests.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mhc_megatron.config import MHCConfig
from mhc_megatron.launch.environment import World
from mhc_megatron.megatron.layer import MHCTransformerLayer
from mhc_megatron.recompute import StreamRecompute
from mhc_megatron.training.config import ModelConfig, ParallelConfig, TrainConfig
from mhc_megatron.training.model import build_chunks, transformer_config
from mhc_megatron.training.runtime import distributed_runtime, set_seed

Impl = Literal["transformer_engine", "local"]

IMPL: Impl = "transformer_engine"
VOCAB, LENGTH, LAYERS = 512, 128, 3
MICRO_BATCHES = 2
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"num_query_groups": 2},
    "moe": {"num_moe_experts": 4, "moe_ffn_hidden_size": 256},
    "padded": {
        "num_moe_experts": 4,
        "moe_ffn_hidden_size": 256,
        "moe_expert_capacity_factor": 1.0,
    },
    "mla": {"multi_latent_attention": True},
}
POLICIES = {
    "a repeat": MHCConfig(),
    "auto": MHCConfig(recompute="auto"),
    "block of 3": MHCConfig(recompute="block", recompute_block=3),  # ends inside a layer
    "stage": MHCConfig(recompute="stage"),
}
# None is bf16.
RECIPES = (None, "delayed", "tensorwise", "blockwise")


def run_config(
    model: str,
    recipe: str | None = None,
    *,
    mhc: MHCConfig | None = None,
    impl: Impl | None = None,
    layers: int = LAYERS,
    **layout: Any,
) -> TrainConfig:
    """Layers of width 256 in bf16, their products in FP8 if there is a recipe.

    ``layout``: arguments of ``ParallelConfig``.
    """
    options: dict[str, Any] = {} if recipe is None else {"fp8": "hybrid", "fp8_recipe": recipe}
    return TrainConfig(
        model=ModelConfig(
            num_layers=layers,
            hidden_size=256,
            num_attention_heads=4,
            ffn_hidden_size=512,
            seq_length=LENGTH,
            **MODELS[model],
        ),
        mhc=mhc or MHCConfig(),
        parallel=ParallelConfig(distributed_optimizer=True, **layout),
        micro_batch_size=1,
        global_batch_size=MICRO_BATCHES,
        dtype="bf16",
        transformer_impl=impl or IMPL,
        **options,
    )


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """What Megatron needs for models of one rank."""
    single = TrainConfig(micro_batch_size=1, global_batch_size=1)
    with distributed_runtime(single, World(rank=0, local_rank=0, world_size=1)):
        yield


def megatron_config(config: TrainConfig) -> TransformerConfig:
    """As training makes it, without the fused softmax that local modules take from apex."""
    made = transformer_config(config)
    made.masked_softmax_fusion = False
    return made


def forget() -> None:
    """Transformer Engine's list of FP8 scales is one for the process, and keeps old models."""
    if IMPL == "transformer_engine":
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        FP8GlobalStateManager.reset()


def build(config: TrainConfig, seed: int = 1) -> torch.nn.Module:
    """The model with parameters at which no gradient vanishes; equal for equal seeds."""
    forget()
    set_seed(config.seed)
    [chunk] = build_chunks(config, megatron_config(config), vocab_size=VOCAB)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in chunk.named_parameters():
        if "hyper_connection" in name:
            scale = 0.02 if parameter.dim() > 1 else 0.5
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.data.add_(noise.to(parameter.device))
        elif parameter.dim() == 1:  # of norms, which start at one
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.add_(noise.to(parameter.device, parameter.dtype))
    return chunk


def losses(chunk: torch.nn.Module, mb: int) -> Tensor:
    """Token losses [1, LENGTH] of a micro-batch."""
    generator = torch.Generator().manual_seed(100 + mb)
    device = next(chunk.parameters()).device
    tokens = torch.randint(0, VOCAB, (1, LENGTH + 1), generator=generator).to(device)
    positions = torch.arange(LENGTH, device=device)[None]
    return chunk(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step leaves: losses, gradients, and the state of FP8's scales, by name."""

    losses: list[Tensor]
    gradients: dict[str, Tensor]
    scales: dict[str, Tensor]

    def differences(self, other: "Step") -> str:
        """What is not equal to the last bit, or not finite: a number and some names; or nothing."""
        found = [] if all(map(torch.equal, self.losses, other.losses)) else ["losses"]
        for mine, its in ((self.gradients, other.gradients), (self.scales, other.scales)):
            assert mine.keys() == its.keys()
            found += [name for name in mine if not torch.equal(mine[name], its[name])]
        if not all(bool(tensor.isfinite().all()) for tensor in self.losses):
            found.append("losses not finite")
        total = 1 + len(self.gradients) + len(self.scales)
        return f"{len(found)} of {total}: {', '.join(found[:4])}" if found else ""


def step(chunk: torch.nn.Module) -> Step:
    """Both micro-batches forward, then backward, so that both are in flight."""
    chunk.zero_grad()
    chunk.set_is_first_microbatch()
    found = [losses(chunk, mb) for mb in range(MICRO_BATCHES)]
    for loss in found:
        loss.float().mean().backward()
    missing = [name for name, p in chunk.named_parameters() if p.grad is None]
    assert not missing, f"no gradient: {missing}"
    gradients = {name: p.grad.clone() for name, p in chunk.named_parameters()}
    return Step([loss.detach().clone() for loss in found], gradients, scales(chunk))


def begin_anew(chunk: torch.nn.Module, mhc: MHCConfig) -> None:
    """As a new model with the recompute policy of ``mhc``: its chain, and FP8's first scales."""
    recompute = None
    if mhc.recompute != "none":
        recompute = StreamRecompute(mhc, num_sublayers=2 * LAYERS)
    for layer in layers(chunk):
        layer.chain.recompute = recompute
    for state in _delayed(chunk).values():
        state.amax_history.zero_()
        state.scale.fill_(1.0)


def scales(chunk: torch.nn.Module) -> dict[str, Tensor]:
    """Histories of largest values, and scales, of delayed scaling; empty for other recipes."""
    found = {}
    for name, state in _delayed(chunk).items():
        found[f"{name} history"] = state.amax_history.clone()
        found[f"{name} scale"] = state.scale.clone()
    return found


def _delayed(chunk: torch.nn.Module) -> dict[str, Any]:
    return {
        f"{name} {key}": state
        for name, module in chunk.named_modules()
        for key, state in getattr(module, "fp8_meta", {}).items()
        if hasattr(state, "amax_history")
    }


def layers(chunk: torch.nn.Module) -> list[MHCTransformerLayer]:
    """The layers of the model."""
    return [module for module in chunk.modules() if isinstance(module, MHCTransformerLayer)]


def relative(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over that of ``b``."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm()).item()


def with_model(config: TrainConfig, **changes: Any) -> TrainConfig:
    """Another model in the same run."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
