"""Step times under pipeline schedules, and weak scaling: the package's trainer on several GPUs.

Shapes of the mHC paper's models (C, sequence, number of heads); in pipelines a dense FFN as wide as
the active experts, 6 + 2, stands for the mixture of experts, and everywhere a vocabulary of bytes
for 129280 entries. Expert parallelism is timed by itself, without the shared experts.
The layers are Transformer Engine's where it is installed, else megatron-core's own, and the results
say which. Without it attention is unfused, and all variants share its time, so that ratios to the
plain residual look better than with a fused one: differences do not.
"""

import importlib.util
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ranks import Ranks, clear_dispatchers

from mhc_megatron.config import Backend, MHCConfig
from mhc_megatron.launch.environment import World
from mhc_megatron.megatron.attention import AttentionKernels, attention_kernels
from mhc_megatron.megatron.step_graph import StepGraph
from mhc_megatron.pipeline.measure import Spans, costs_of, timeline_of
from mhc_megatron.pipeline.simulate import simulate
from mhc_megatron.pipeline.stopwatch import stopwatch
from mhc_megatron.training.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from mhc_megatron.training.model import DTYPES
from mhc_megatron.training.pipeline import pipeline_schedule
from mhc_megatron.training.runtime import distributed_runtime
from mhc_megatron.training.trainer import Trainer

WARM_UP, TIMED = 3, 4  # steps; one more is measured action by action
SECONDS = 75.0  # of a schedule with all variants; the first compiles the kernels
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


def variants(schedule: str, launch: str) -> dict[str, Variant]:
    """By name; a schedule that pairs forwards with backwards can also overlap them.

    Not as a graph: ``cuda_graph`` refuses ``parallel.overlap``.
    """
    more = {"dualpipe_v": OVERLAPPED, NO_PIPELINE: PAIRED}.get(schedule, {})
    found = VARIANTS | more
    return {n: v for n, v in found.items() if v.overlap == "none" or not LAUNCHES[launch]}


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


@dataclass(kw_only=True)
class Timed:
    """What a rank measured.

    Attributes:
        seconds: of every timed step.
        receiving: seconds inside receives in the measured step, under Megatron's own schedules.
        spans: of all ranks' actions in the measured step, under a schedule of ours.
        peak_bytes: allocated at most; 0 without a GPU.
        attention: kernels that Transformer Engine computed it with, if it did.
    """

    seconds: list[float]
    receiving: float
    spans: list[Spans]
    peak_bytes: int
    attention: AttentionKernels | None


def time_steps(rank: int, world_size: int, configs: list[TrainConfig]) -> list[Timed]:
    """A job: steps of several runs that have one layout."""
    found = []
    world = World(rank=rank, local_rank=rank, world_size=world_size)
    with distributed_runtime(configs[0], world):
        for config in configs:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            found.append(_time(config))
            clear_dispatchers()
            torch.cuda.empty_cache()
    return found


def _time(config: TrainConfig) -> Timed:
    trainer = Trainer(config)
    metrics = [trainer.step(step) for step in range(config.steps - 1)]
    timers = Timers()
    trainer.megatron_config.timers = timers
    last = trainer.step(config.steps - 1)
    if isinstance(trainer.forward_backward, StepGraph):
        trainer.forward_backward.forget()
    # The optimizer keeps views of float32 parameters, behind which Python's collector cannot see:
    # without this the configuration and the model would keep each other, beside the next run.
    trainer.megatron_config.grad_scale_func = trainer.megatron_config.no_sync_func = None
    on_gpu = torch.cuda.is_available()
    return Timed(
        seconds=[step.seconds for step in metrics[WARM_UP:]],
        receiving=timers.receiving(),
        spans=last.spans,
        peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else 0,
        attention=attention_kernels(),
    )


class Timers:
    """What Megatron's schedules call as ``config.timers``: a stopwatch for each of its names."""

    def __init__(self) -> None:
        self._by_name: dict[str, Timer] = {}

    def __call__(self, name: str, log_level: int | None = None) -> "Timer":
        return self._by_name.setdefault(name, Timer())

    def receiving(self) -> float:
        """Seconds between start and end of what receives."""
        return sum(
            end - start
            for name, timer in self._by_name.items()
            if "recv" in name
            for start, end in timer.watch.spans()
        )


class Timer:
    """One of Megatron's timers."""

    def __init__(self) -> None:
        self.watch = stopwatch(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def start(self, barrier: bool = False) -> None:
        """Megatron's; the barrier would become part of what is measured."""
        self.watch.start()

    def stop(self) -> None:
        """Megatron's."""
        self.watch.stop()


def step_config(
    size: Size,
    num_ranks: int,
    schedule: str,
    variant: Variant,
    *,
    num_layers: int | None,
    graph: bool = False,
) -> TrainConfig:
    """A run of one schedule and variant on ``num_ranks`` pipeline ranks, bf16."""
    layers = num_layers or {1: 8, 2: 12}.get(num_ranks, 16)
    return _config(
        size,
        ParallelConfig(
            pipeline=num_ranks,
            distributed_optimizer=True,
            overlap=variant.overlap,
            **(_alone(variant) if schedule == NO_PIPELINE else SCHEDULES[schedule]),
        ),
        MHCConfig(backend=size.backend, recompute=variant.recompute),
        residual=variant.residual,
        num_layers=layers,
        num_mb=4 * num_ranks,
        graph=graph,
    )


def _alone(variant: Variant) -> dict[str, Any]:
    """Arguments of ``ParallelConfig`` for a rank without a pipeline."""
    return {"schedule": "dualpipe_v"} if variant.pairs else {}


def _config(
    size: Size,
    layout: ParallelConfig,
    mhc: MHCConfig,
    *,
    residual: Any,
    num_layers: int,
    num_mb: int,
    experts: bool = False,
    graph: bool = False,
) -> TrainConfig:
    moe = {
        "num_moe_experts": size.experts,
        "moe_router_topk": ACTIVE,
        "moe_ffn_hidden_size": size.ffn // 8,
        "moe_expert_capacity_factor": 1.0,
    }
    return TrainConfig(
        model=ModelConfig(
            **(moe if experts else {}),
            residual=residual,
            num_layers=num_layers,
            hidden_size=size.hidden,
            num_attention_heads=size.heads,
            ffn_hidden_size=size.ffn,
            seq_length=size.seq,
        ),
        mhc=mhc,
        parallel=layout,
        optimizer=OptimizerConfig(warmup_steps=0),
        steps=WARM_UP + TIMED + 1,
        micro_batch_size=1,
        global_batch_size=num_mb * layout.data,
        eval_iters=1,
        transformer_impl=TRANSFORMER_IMPL,
        cuda_graph=graph,
        dtype="bf16",
        timeout_minutes=SECONDS / 60,
        out=str(size.out / "run"),
    )


def step_lines(
    ranks: Ranks, size: Size, schedule: str, launch: str, *, num_layers: int | None
) -> Iterator[dict[str, Any]]:
    """Result lines of a schedule, all variants, one of ``LAUNCHES``, without provenance."""
    configs = {
        name: step_config(
            *(size, ranks.num_ranks, schedule, variant),
            num_layers=num_layers,
            graph=LAUNCHES[launch],
        )
        for name, variant in variants(schedule, launch).items()
    }
    yield from _variant_lines(ranks, configs, {"schedule": schedule}, launch)


def expert_lines(ranks: Ranks, size: Size, *, num_layers: int | None) -> Iterator[dict[str, Any]]:
    """Result lines of a mixture of experts over all ranks, without a pipeline.

    Every expert's input is padded: what exchanges take does not depend on the router. Under
    ``dualpipe_v`` a rank has two stages, whose exchanges an overlap can hide.
    """
    configs = {
        name: _config(
            size,
            ParallelConfig(
                data=ranks.num_ranks,
                expert=ranks.num_ranks,
                distributed_optimizer=True,
                overlap=variant.overlap,
                **_alone(variant),
            ),
            MHCConfig(backend=size.backend, recompute=variant.recompute),
            residual=variant.residual,
            num_layers=num_layers or 4,
            num_mb=8,
            experts=True,
        )
        for name, variant in (VARIANTS | PAIRED).items()
    }
    yield from _variant_lines(ranks, configs, {"expert": ranks.num_ranks}, "eager")


def _variant_lines(
    ranks: Ranks, configs: dict[str, TrainConfig], shape: dict[str, Any], launch: str
) -> Iterator[dict[str, Any]]:
    """Lines of configurations by name, the first of which is what the others are compared with."""
    by_variant = _timed(ranks, list(configs.values()))
    # Inside a graph no action is measured: what micro-batches more add to a step is.
    longer = [_twice(config) for config in configs.values() if _has_hidden_stages(config)]
    by_longer = _timed(ranks, longer) if longer else [None] * len(configs)
    baseline: dict[str, float] = {}
    for (variant, config), timed, more_timed in zip(
        configs.items(), by_variant, by_longer, strict=True
    ):
        figures = list(_figures(config, timed))
        if more_timed is not None:
            added = _step_ms(more_timed) - _step_ms(timed)
            figures.append(("stage", added / config.num_micro_batches, "ms", {}))
        for metric, value, unit, more in figures:
            line = {
                "impl": "megatron_core" if variant == "plain" else f"mhc_megatron.{variant}",
                "shape": {**_shape(config), **shape},
                "metric": metric,
                "value": value,
                "unit": unit,
                "launch": launch,
                **_attention(timed),
                **more,
            }
            if variant == "plain":
                baseline[metric] = value
            elif metric in baseline:
                line["baseline"] = baseline[metric]
                line["ratio_to_baseline"] = round(value / baseline[metric], 4)
            yield line


def _timed(ranks: Ranks, configs: list[TrainConfig]) -> list[list[Timed]]:
    """By configuration, what every rank measured."""
    by_rank = ranks.run(time_steps, ranks.num_ranks, configs, seconds=SECONDS)
    return [list(timed) for timed in zip(*by_rank, strict=True)]


def _attention(timed: list[Timed]) -> dict[str, str]:
    return {} if timed[0].attention is None else {"attention": timed[0].attention}


def _has_hidden_stages(config: TrainConfig) -> bool:
    return config.cuda_graph and config.parallel.pipeline > 1


def _twice(config: TrainConfig) -> TrainConfig:
    return replace(config, global_batch_size=2 * config.global_batch_size)


def _steps_ms(timed: list[Timed]) -> list[float]:
    # A step ends when its last rank does.
    return [1e3 * max(step) for step in zip(*(rank.seconds for rank in timed), strict=True)]


def _step_ms(timed: list[Timed]) -> float:
    return statistics.median(_steps_ms(timed))


def _figures(
    config: TrainConfig, timed: list[Timed]
) -> Iterator[tuple[str, float, str, dict[str, Any]]]:
    """(metric, value, unit, other keys)."""
    steps, step = _steps_ms(timed), _step_ms(timed)
    tokens = config.global_batch_size * config.model.seq_length
    yield "step", step, "ms", {"spread": [min(steps), max(steps)]}
    yield "throughput", tokens / step * 1e3, "tokens/s", {}
    if timed[0].peak_bytes:
        yield "peak_memory", max(rank.peak_bytes for rank in timed), "bytes", {}
    if config.cuda_graph:
        return
    if not timed[0].spans:
        if config.parallel.pipeline > 1:
            waits = [1e3 * rank.receiving for rank in timed]
            yield "receive_wait", statistics.mean(waits), "ms", {"spread": [min(waits), max(waits)]}
        return
    timeline = timeline_of(pipeline_schedule(config), timed[0].spans)
    foretold = simulate(timeline.schedule, costs_of(timeline))
    waits = timeline.bubble
    # On paper the same actions take the same times, and messages take none.
    more = {"spread": [min(waits), max(waits)], "exposed": timeline.makespan - foretold.makespan}
    yield "receive_wait", statistics.mean(waits), "ms", more
    yield "bubble", timeline.bubble_fraction, "1", {"simulated": foretold.bubble_fraction}
    yield "stage", max(timeline.busy) / config.num_micro_batches, "ms", {}


def _shape(config: TrainConfig) -> dict[str, Any]:
    model = config.model
    return {
        "T": config.micro_batch_size * model.seq_length,
        "C": model.hidden_size,
        "n": config.mhc.num_streams if model.residual == "mhc" else 1,
        "layers": model.num_layers,
        "heads": model.num_attention_heads,
        **(
            {"ffn": model.ffn_hidden_size}
            if model.num_moe_experts is None
            else {"ffn": model.moe_ffn_hidden_size, "experts": model.num_moe_experts}
        ),
        "micro_batches": config.num_micro_batches,
        "ranks": config.parallel.world_size,
        "dtype": str(DTYPES[config.dtype]).removeprefix("torch."),
        "transformer_impl": config.transformer_impl,
    }


def scaling_lines(
    ranks: Ranks, size: Size, launch: str, *, num_layers: int
) -> Iterator[dict[str, Any]]:
    """Result lines of data parallelism over 1, 2, 4, ... ranks with equal work on each."""
    one = 0.0
    for data in (1, 2, 4, 8):
        if data > ranks.num_ranks:
            return
        config = _config(
            size,
            ParallelConfig(data=data, distributed_optimizer=True),
            MHCConfig(backend=size.backend),
            residual="mhc",
            num_layers=num_layers,
            num_mb=4,
            graph=LAUNCHES[launch],
        )
        by_rank = ranks.run(time_steps, data, [config], seconds=SECONDS)
        for metric, value, unit, more in _figures(config, [rank[0] for rank in by_rank]):
            line = {
                "impl": "mhc_megatron.mhc",
                "shape": {**_shape(config), "data": data},
                "metric": metric,
                "value": value,
                "unit": unit,
                "launch": launch,
                **_attention([rank[0] for rank in by_rank]),
                **more,
            }
            if metric == "throughput":
                one = one or value
                line["ratio_to_linear"] = round(value / (data * one), 4)
            yield line
