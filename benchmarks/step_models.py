"""What the step benchmarks time: models, variants of their residual, and runs of them.

Shapes of the mHC paper's models (C, sequence, number of heads); in pipelines a dense FFN as wide as
the active experts, 6 + 2, stands for the mixture of experts, and everywhere a vocabulary of bytes
for 129280 entries. Expert parallelism is timed by itself, without the shared experts.
The layers are Transformer Engine's where it is installed, else megatron-core's own, and the results
say which. Without it attention is unfused, and all variants share its time, so that ratios to the
plain residual look better than with a fused one: differences do not.
"""

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mhc_megatron.config import Backend, MHCConfig
from mhc_megatron.training.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig

WARM_UP, TIMED = 3, 4  # steps; one more is measured action by action
SECONDS = 75.0  # of a variant; the first compiles the kernels
ACTIVE = 6  # experts of a token
LAUNCHES = {"eager": False, "graph": True}  # value: cuda_graph
NO_PIPELINE = "none"
SCHEDULES: dict[str, dict[str, Any]] = {
    "1f1b": {"schedule": "megatron"},
    "interleaved": {"schedule": "megatron", "virtual": 2},
    "one_f_one_b": {"schedule": "one_f_one_b"},
    "zb_h1": {"schedule": "zb_h1"},
    "dualpipe_v": {"schedule": "dualpipe_v"},
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is timed under a schedule: a residual, its recompute and its overlap.

    Attributes:
        pairs: without a pipeline, two stages on a rank, whose forwards and backwards are paired.
    """

    residual: Any = "mhc"
    recompute: Any = "none"
    overlap: Any = "none"
    pairs: bool = False


# The first is what the others are compared with.
VARIANTS = {
    "plain": Variant(residual="plain"),
    "mhc": Variant(),
    "mhc_recompute": Variant(recompute="auto"),
}
OVERLAPPED = {"mhc_overlap": Variant(recompute="auto", overlap="all", pairs=True)}
PAIRED = {"mhc_pairs": Variant(recompute="auto", pairs=True), **OVERLAPPED}
TRANSFORMER_IMPL: Any = (
    "local" if importlib.util.find_spec("transformer_engine") is None else "transformer_engine"
)


def variants(schedule: str) -> dict[str, Variant]:
    """By name; a schedule that pairs forwards with backwards can also overlap them."""
    return VARIANTS | {"dualpipe_v": OVERLAPPED, NO_PIPELINE: PAIRED}.get(schedule, {})


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the model that is timed.

    Attributes:
        ffn: of a dense MLP; of an expert an eighth of it.
        experts: routed ones, ``ACTIVE`` of which take a token.
    """

    hidden: int
    heads: int
    ffn: int
    experts: int
    seq: int = 4096
    backend: Backend = "triton"
    out: Path = Path()  # where the trainer prepares its data


MODELS = {
    "3B": Size(hidden=1280, heads=16, ffn=8 * 896, experts=64),
    "27B": Size(hidden=2560, heads=32, ffn=8 * 1536, experts=72),
}


def size_of(
    model: str, *, hidden: int | None, seq: int | None, backend: Backend, out: Path
) -> Size:
    """Of one of MODELS, with ``hidden`` and ``seq`` in their place where they are given."""
    size = replace(MODELS[model], backend=backend, out=out)
    if hidden:
        ffn = size.ffn * hidden // size.hidden
        size = replace(size, hidden=hidden, heads=4, ffn=ffn, experts=8)
    return replace(size, seq=seq or size.seq)


def step_config(
    size: Size,
    num_ranks: int,
    schedule: str,
    variant: Variant,
    launch: str,
    *,
    num_layers: int | None,
) -> TrainConfig:
    """A run of one schedule and variant on ``num_ranks`` pipeline ranks."""
    return _config(
        size,
        variant,
        launch,
        num_layers=num_layers or {1: 8, 2: 12}.get(num_ranks, 16),
        num_mb=4 * num_ranks,
        pipeline=num_ranks,
        **(_alone(variant) if schedule == NO_PIPELINE else SCHEDULES[schedule]),
    )


def expert_config(
    size: Size, num_ranks: int, variant: Variant, launch: str, *, num_layers: int | None
) -> TrainConfig:
    """A run of a mixture of experts over ``num_ranks`` ranks, without a pipeline.

    Every expert's input is padded: what exchanges take does not depend on the router. Under
    ``dualpipe_v`` a rank has two stages, whose exchanges an overlap can hide.
    """
    return _config(
        size,
        variant,
        launch,
        num_layers=num_layers or 4,
        num_mb=8,
        experts=True,
        data=num_ranks,
        expert=num_ranks,
        **_alone(variant),
    )


def scaling_config(size: Size, num_ranks: int, launch: str, *, num_layers: int) -> TrainConfig:
    """A run on ``num_ranks`` data-parallel ranks, as much work for each as one has alone."""
    return _config(size, VARIANTS["mhc"], launch, num_layers=num_layers, num_mb=4, data=num_ranks)


def _alone(variant: Variant) -> dict[str, Any]:
    """Arguments of ``ParallelConfig`` for a rank without a pipeline."""
    return {"schedule": "dualpipe_v"} if variant.pairs else {}


def _config(
    size: Size,
    variant: Variant,
    launch: str,
    *,
    num_layers: int,
    num_mb: int,
    experts: bool = False,
    **layout: Any,
) -> TrainConfig:
    """In bf16; ``num_mb`` micro-batches a replica, ``layout``: arguments of ``ParallelConfig``."""
    parallel = ParallelConfig(distributed_optimizer=True, overlap=variant.overlap, **layout)
    moe = {
        "num_moe_experts": size.experts,
        "moe_router_topk": ACTIVE,
        "moe_ffn_hidden_size": size.ffn // 8,
        "moe_expert_capacity_factor": 1.0,
    }
    return TrainConfig(
        model=ModelConfig(
            **(moe if experts else {}),
            residual=variant.residual,
            num_layers=num_layers,
            hidden_size=size.hidden,
            num_attention_heads=size.heads,
            ffn_hidden_size=size.ffn,
            seq_length=size.seq,
        ),
        mhc=MHCConfig(backend=size.backend, recompute=variant.recompute),
        parallel=parallel,
        optimizer=OptimizerConfig(warmup_steps=0),
        steps=WARM_UP + TIMED + 1,
        micro_batch_size=1,
        global_batch_size=num_mb * parallel.data,
        eval_iters=1,
        transformer_impl=TRANSFORMER_IMPL,
        cuda_graph=LAUNCHES[launch],
        dtype="bf16",
        timeout_minutes=SECONDS / 60,
        out=str(size.out / "run"),
    )
