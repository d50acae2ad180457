"""What hyper-connections cost a pipeline stage of Transformer Engine blocks, in bf16 and in FP8.

    python benchmarks/te_blocks.py --results benchmarks/results/h100
    python benchmarks/te_blocks.py --results benchmarks/results/h100 --launches graph --padded

A stage from the middle of a model, with Megatron's layer specs: blocks of the mHC paper's 3B, 9B
and 27B models (table 5: MoE with MLA), and of a dense model of the size of 8B. Forward and backward
of one micro-batch of sequences of 4096 tokens, without hyper-connections, with them, and with their
states recomputed, taking turns. All three have the same weights. The weights' FP8 copies are made
once, as by the first micro-batch of a step; gradients are bf16 and start empty. The paper does not
say the rank of MLA's queries: here it is that of the keys and values.
Launched as a CUDA graph a step does not depend on the host. Experts then need ``--padded``, or the
host waits in every layer to know how many tokens each expert has.
Appends to ``<results>/te_blocks.jsonl`` (format: benchmarks/README.md) as it goes.
"""

import argparse
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cudnn_first  # noqa: F401
import torch
from alone import one_process
from captured import capture, side_stream
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from provenance import append, provenance
from timing import kernel_profile
from torch import Tensor

from mhc_megatron.config import MHCConfig
from mhc_megatron.megatron.chunks import stage_place
from mhc_megatron.megatron.spec import gpt_block_spec
from mhc_megatron.report.gpu_kinds import mhc_kernel_names

STAGES, STAGE = 3, 1  # the middle one of three alike
STREAMS = 4
PLAIN = "plain"
VARIANTS: dict[str, MHCConfig | None] = {
    PLAIN: None,
    "none": MHCConfig(num_streams=STREAMS),
    "auto": MHCConfig(num_streams=STREAMS, recompute="auto"),
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Blocks of one model.

    Attributes:
        name: of the model.
        channels, heads, ffn: C, attention heads of 128, and the width of an expert or of the MLP.
        experts: routed ones, six of them active and two shared beside them; None for a dense MLP
            and grouped-query attention with eight key/value heads.
        blocks: in the stage.
        tokens: of a sequence.
        sequences: of the micro-batch. With few the host that launches may be slower than the GPU.
    """

    name: str
    channels: int
    heads: int
    ffn: int
    experts: int | None = None
    blocks: int = 4
    tokens: int = 4096
    sequences: int = 1


SIZES = {
    size.name: size
    for size in (
        Size(name="27B", channels=2560, heads=32, ffn=1536, experts=72),
        Size(name="8B-dense", channels=4096, heads=32, ffn=14336),
        Size(name="9B", channels=1920, heads=24, ffn=1280, experts=64),
        Size(name="3B", channels=1280, heads=16, ffn=896, experts=64),
    )
}


def megatron_config(
    size: Size, recipe: str | None, *, engine: bool = True, padded: bool = False
) -> TransformerConfig:
    """Megatron's configuration of a model of three such stages.

    Args:
        size: of a stage.
        recipe: of FP8; None for bf16.
        engine: Transformer Engine's modules and fused kernels; without, a rehearsal on a CPU.
        padded: every expert gets as many tokens as if all were evenly spread, the likeliest ones or
            zeros, so that the host need not know how many chose it.
    """
    options: dict[str, Any] = {
        "num_layers": STAGES * size.blocks,
        "pipeline_model_parallel_size": STAGES,
        "hidden_size": size.channels,
        "num_attention_heads": size.heads,
        "ffn_hidden_size": size.ffn,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "bias_activation_fusion": engine,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "pipeline_dtype": torch.bfloat16,
        "transformer_impl": "transformer_engine" if engine else "local",
        "masked_softmax_fusion": engine,
        "gradient_accumulation_fusion": False,
        "use_cpu_initialization": not torch.cuda.is_available(),
    }
    if recipe is not None:
        options |= {"fp8": "hybrid", "fp8_recipe": recipe}
    if size.experts is None:
        return TransformerConfig(**options, num_query_groups=8)
    if padded:
        options |= {"moe_pad_expert_input_to_capacity": True, "moe_expert_capacity_factor": 1.0}
    return MLATransformerConfig(
        **options,
        multi_latent_attention=True,
        qk_layernorm=True,
        q_lora_rank=512,
        kv_lora_rank=512,
        qk_head_dim=128,
        qk_pos_emb_head_dim=64,
        v_head_dim=128,
        rope_type="rope",
        num_moe_experts=size.experts,
        moe_router_topk=6,
        moe_ffn_hidden_size=size.ffn,
        moe_shared_expert_intermediate_size=2 * size.ffn,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=engine,
        moe_permute_fusion=engine,
    )


class Stage:
    """The blocks, with or without hyper-connections, and one micro-batch for them.

    Args:
        size: of the stage.
        config: from ``megatron_config``.
        mhc: the hyper-connections; None for the plain residual.
        like: a stage whose weights this one takes for its own.
    """

    def __init__(
        self, size: Size, config: TransformerConfig, mhc: MHCConfig | None, like: "Stage | None"
    ) -> None:
        place = stage_place(config, STAGE)
        engine = config.transformer_impl == "transformer_engine"
        self.chunk = GPTModel(
            config=config,
            transformer_layer_spec=gpt_block_spec(
                config, mhc, use_transformer_engine=engine, pp_rank=STAGE
            ),
            vocab_size=128,
            max_sequence_length=size.tokens,
            pre_process=False,
            post_process=False,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            pg_collection=place.groups,
        )
        if torch.cuda.is_available():
            self.chunk.cuda()
        if like is not None:
            shared = dict(like.chunk.named_parameters())
            for name, parameter in self.chunk.named_parameters():
                if name in shared:
                    parameter.data = shared[name].data
        device = next(self.chunk.parameters()).device
        width = size.channels * (1 if mhc is None else STREAMS)
        generator = torch.Generator(device).manual_seed(1)
        one = torch.randn(
            size.tokens, size.sequences, size.channels, generator=generator, device=device
        )
        self.x = one.bfloat16().repeat(1, 1, width // size.channels).requires_grad_()
        self.grad = torch.randn(self.x.shape, device=device, dtype=torch.bfloat16) / size.tokens
        self.positions = torch.arange(size.tokens, device=device).repeat(size.sequences, 1)

    def forget(self) -> None:
        """Take the gradients away."""
        self.x.grad = None
        for parameter in self.chunk.parameters():
            parameter.grad = None

    def step(self) -> Tensor:
        """Forward and backward; returns the output."""
        self.chunk.set_input_tensor(self.x)
        output = self.chunk(None, self.positions, None)
        output.backward(self.grad)
        return output.detach()


def kernel_times(stage: Stage) -> tuple[float, float]:
    """Milliseconds that a step's kernels take, one after the other: all, and ours."""
    stage.forget()
    times, ours = kernel_profile(stage.step), mhc_kernel_names()
    return sum(times.values()), sum(ms for name, ms in times.items() if name in ours)


def as_graph(stage: Stage) -> Callable[[], object]:
    """Replays of a stage's step."""
    for _ in range(2):
        stage.forget()
        stage.step()
    stage.forget()
    graph, _ = capture(stage.step)
    return graph.replay


def measure(
    size: Size, recipe: str | None, repetitions: int, *, launch: str, padded: bool
) -> Iterator[dict[str, Any]]:
    """The lines of one stage, without their provenance."""
    config = megatron_config(size, recipe, padded=padded)
    eager = launch == "eager"
    stages: dict[str, Stage] = {}
    for name, mhc in VARIANTS.items():
        stages[name] = Stage(size, config, mhc, stages.get(PLAIN))
    steps = {name: stage.step if eager else as_graph(stage) for name, stage in stages.items()}
    times: dict[str, list[float]] = {name: [] for name in stages}
    memory: dict[str, int] = {}
    for repetition in range(repetitions + 3):  # the first three warm up
        for name, stage in stages.items():
            stage.forget()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            steps[name]()
            stop.record()
            stop.synchronize()
            if repetition >= 3:
                times[name].append(start.elapsed_time(stop))
                memory[name] = torch.cuda.max_memory_allocated() - before
            stage.forget()
    plain_time = statistics.median(times[PLAIN])
    for name, found in times.items():
        median = statistics.median(found)
        yield {
            **common_keys(size, recipe, name, padded),
            "metric": "step",
            "value": round(median, 3),
            "spread": [round(min(found), 3), round(max(found), 3)],
            "unit": "ms",
            "tokens_per_s": round(size.tokens * size.sequences / median * 1e3),
            "plain": round(plain_time, 3),
            "overhead": round(100 * (median / plain_time - 1), 2),
            "launch": launch,
        }
        if not eager:  # whose memory is the graph's, and stays; its kernels are the same
            continue
        yield {
            **common_keys(size, recipe, name, padded),
            "metric": "memory",
            "value": memory[name],
            "unit": "bytes",
            "plain": memory[PLAIN],
        }
    if not eager:
        return
    kernels = {name: kernel_times(stage) for name, stage in stages.items()}
    plain_kernels = kernels[PLAIN][0]
    if not plain_kernels:
        print("the profiler sees no kernels here: their times are left out", file=sys.stderr)
        return
    for name, (every, ours) in kernels.items():
        yield {
            **common_keys(size, recipe, name, padded),
            "metric": "kernels",
            "value": round(every, 3),
            "unit": "ms",
            "hyper_connections": round(ours, 3),
            "plain": round(plain_kernels, 3),
            "overhead": round(100 * (every / plain_kernels - 1), 2),
        }


def common_keys(size: Size, recipe: str | None, variant: str, padded: bool) -> dict[str, Any]:
    """What all lines of a variant share."""
    experts = {"experts": "padded"} if padded and size.experts is not None else {}
    return {
        "benchmark": "te_blocks",
        "impl": "megatron-core" if variant == PLAIN else f"mhc_megatron.{variant}",
        "shape": {
            "model": size.name,
            "blocks": size.blocks,
            "T": size.tokens * size.sequences,
            "C": size.channels,
            "n": 1 if variant == PLAIN else STREAMS,
            "dtype": "bf16" if recipe is None else f"fp8_{recipe}",
            **experts,
        },
    }


def show(line: dict[str, Any]) -> str:
    """A line of the table."""
    shape = line["shape"]
    row = (
        f"{shape['model']:<9}{shape['dtype']:<15}{line['impl']:<19}{line['metric']:<8}"
        f"{line['value']:>14,} {line['unit']:<6}"
    )
    if "overhead" in line:
        row += f"{line['overhead']:>7.2f} % over plain"
    if "hyper_connections" in line:
        row += f", {line['hyper_connections']:.3f} ms in hyper-connections"
    return row


def main() -> int:
    """Measure and append; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="results folder")
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["bf16", "blockwise"],
        choices=["bf16", "delayed", "tensorwise", "blockwise"],
        help="bf16, or FP8 by recipe (default: %(default)s)",
    )
    parser.add_argument(
        "--sequences", type=int, default=1, help="of the micro-batch (default: %(default)s)"
    )
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--launches", nargs="+", default=["eager"], choices=["eager", "graph"])
    parser.add_argument(
        "--padded", action="store_true", help="experts' tokens padded to an even share"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=130.0,
        help="after these no other stage is measured (default: %(default)g)",
    )
    parser.add_argument("--commit", help="the code measured (default: git's HEAD)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: needs a GPU and Transformer Engine", file=sys.stderr)
        return 2
    graphed = "graph" in args.launches
    if graphed and not args.padded and any(SIZES[name].experts for name in args.models):
        parser.error("--launches graph of experts needs --padded: the host must not wait for them")
    deadline = time.monotonic() + args.seconds
    source, left = provenance(args.commit), []
    args.results.mkdir(parents=True, exist_ok=True)
    with one_process(cuda_graph=graphed), side_stream(torch.device("cuda", 0)):
        for name, dtype, launch in itertools.product(args.models, args.dtypes, args.launches):
            if time.monotonic() > deadline:
                left.append(f"{name} {dtype} {launch}")
                continue
            recipe = None if dtype == "bf16" else dtype
            size = replace(SIZES[name], sequences=args.sequences)
            options = {"launch": launch, "padded": args.padded}
            for line in measure(size, recipe, args.repetitions, **options):
                append(args.results, line, source)
                print(show(line), flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    if left:
        print(f"not measured within {args.seconds:g} s: {', '.join(left)}", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
