"""Result lines of step times: pipeline schedules, expert parallelism, and weak scaling."""

import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ranks import Ranks
from step_models import (
    NO_PIPELINE,
    SECONDS,
    Size,
    expert_config,
    scaling_config,
    step_config,
    variants,
)
from step_timer import Timed, time_steps

from mhc_megatron.pipeline.measure import costs_of, timeline_of
from mhc_megatron.pipeline.simulate import simulate
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.model import DTYPES
from mhc_megatron.training.pipeline import pipeline_schedule

# Metric, value, unit, and other keys of its line.
Figure = tuple[str, float, str, dict[str, Any]]


def step_lines(
    ranks: Ranks, size: Size, schedule: str, launch: str, *, num_layers: int | None
) -> Iterator[dict[str, Any]]:
    """Result lines of a schedule, all variants, one of ``LAUNCHES``, without provenance."""
    configs = {
        name: step_config(size, ranks.num_ranks, schedule, variant, launch, num_layers=num_layers)
        for name, variant in variants(schedule).items()
    }
    yield from _variant_lines(ranks, configs, {"schedule": schedule})


def expert_lines(
    ranks: Ranks, size: Size, launch: str, *, num_layers: int | None, only: list[str] | None
) -> Iterator[dict[str, Any]]:
    """Result lines of expert parallelism over all ranks, of all variants or ``only`` of those named
    there, and of what they are compared with."""
    found = variants(NO_PIPELINE)
    if only and not found.keys() & set(only):
        return
    configs = {
        name: expert_config(size, ranks.num_ranks, variant, launch, num_layers=num_layers)
        for name, variant in found.items()
        if not only or name in ("plain", *only)
    }
    yield from _variant_lines(ranks, configs, {"expert": ranks.num_ranks})


def _variant_lines(
    ranks: Ranks, configs: dict[str, TrainConfig], layout: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Lines of configurations by name, the first of which is what the others are compared with.

    A job for each: what was found is there if no time is left for the next.
    """
    baseline: dict[str, float] = {}
    for variant, config in configs.items():
        # Inside a graph no action is measured: what micro-batches more add to a step is.
        longer = [_twice(config)] if _has_hidden_stages(config) else []
        timed, *more = _timed(ranks, [config, *longer], ranks.num_ranks)
        figures = list(_figures(config, timed))
        for with_more in more:
            added = _step_ms(with_more) - _step_ms(timed)
            figures.append(("stage", added / config.num_micro_batches, "ms", {}))
        for figure in figures:
            line = _line(variant, config, layout, timed, figure)
            metric, value = line["metric"], line["value"]
            if variant == "plain":
                baseline[metric] = value
            elif metric in baseline:
                line["baseline"] = baseline[metric]
                line["ratio_to_baseline"] = round(value / baseline[metric], 4)
            yield line


def _line(
    variant: str,
    config: TrainConfig,
    layout: dict[str, Any],
    timed: list[Timed],
    figure: Figure,
) -> dict[str, Any]:
    metric, value, unit, more = figure
    attention = timed[0].attention
    return {
        "impl": "megatron_core" if variant == "plain" else f"mhc_megatron.{variant}",
        "shape": {**_shape(config), **layout},
        "metric": metric,
        "value": value,
        "unit": unit,
        "launch": "graph" if config.cuda_graph else "eager",
        **({} if attention is None else {"attention": attention}),
        **more,
    }


def _timed(ranks: Ranks, configs: list[TrainConfig], num_ranks: int) -> list[list[Timed]]:
    """By configuration, what every rank measured."""
    by_rank = ranks.run(time_steps, num_ranks, configs, seconds=SECONDS)
    return [list(timed) for timed in zip(*by_rank, strict=True)]


def _has_hidden_stages(config: TrainConfig) -> bool:
    return config.cuda_graph and config.parallel.world_size > 1


def _twice(config: TrainConfig) -> TrainConfig:
    return replace(config, global_batch_size=2 * config.global_batch_size)


def _steps_ms(timed: list[Timed]) -> list[float]:
    # A step ends when its last rank does.
    return [1e3 * max(step) for step in zip(*(rank.seconds for rank in timed), strict=True)]


def _step_ms(timed: list[Timed]) -> float:
    return statistics.median(_steps_ms(timed))


def _figures(config: TrainConfig, timed: list[Timed]) -> Iterator[Figure]:
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
        config = scaling_config(size, data, launch, num_layers=num_layers)
        [timed] = _timed(ranks, [config], data)
        for figure in _figures(config, timed):
            line = _line("mhc", config, {"data": data}, timed, figure)
            if line["metric"] == "throughput":
                one = one or line["value"]
                line["ratio_to_linear"] = round(line["value"] / (data * one), 4)
            yield line
