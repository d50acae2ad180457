"""Schedules with W on virtual ranks: Transformer Engine's weight gradients really wait for it."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import engine
from megatron.core.tensor_parallel.random import initialize_rng_tracker

from mhc_megatron.megatron.delayed_wgrad import QueuedWeightGrads
from mhc_megatron.pipeline.stage import AutogradStage

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
virtual_ranks = importlib.import_module("virtual_ranks")


@pytest.fixture(scope="module", autouse=True)
def _random_states() -> Iterator[None]:
    """Virtual ranks take Megatron's random states away from later tests."""
    yield
    initialize_rng_tracker(force_reset=True)


def ranks(schedule: str, recipe: str | None, model: str = "dense", **options: Any) -> Any:
    """Virtual ranks with the parameters and micro-batches of one seed, and fresh scales."""
    engine.forget()
    fp8 = {} if recipe is None else {"fp8": "hybrid", "fp8_recipe": recipe}
    config = virtual_ranks.run_config(
        schedule, 2, hidden_size=128, seq_length=64, transformer_impl=engine.IMPL, **fp8
    )
    config = engine.with_model(config, **engine.MODELS[model])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = virtual_ranks.VirtualRanks(config, device, **options)
    made.draw(0)
    return made


@pytest.mark.parametrize(
    ("schedule", "model", "recipe"),
    [
        ("dualpipe_v", "dense", None),
        ("zb_h1", "mla", None),
        ("dualpipe", "dense", None),
        ("dualpipe_v", "moe", "blockwise"),
        ("zb_h1", "moe", None),
        ("dualpipe_v", "dense", "delayed"),
        ("dualpipe_v", "dense", "tensorwise"),
    ],
)
def test_the_bits_of_a_loop_without_delay(schedule: str, model: str, recipe: str | None) -> None:
    serial = ranks(schedule, recipe, model, delay=False).serial()
    found = ranks(schedule, recipe, model).pipelined().differences(serial)
    assert not found, f"{len(found)} of {len(serial.gradients)}: {', '.join(found[:4])}"


def test_w_computes_what_i_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every W of every stage adds a gradient that was not there, or another, to each weight."""
    if engine.IMPL == "local":
        pytest.fail("local modules queue nothing")
    virtual = ranks("zb_h1", None)
    moved: list[int] = []
    weights = AutogradStage.weights

    def counted(stage: AutogradStage, mb: int) -> None:
        chunk = virtual.chunks[0][int(stage._name.removeprefix("stage "))]
        waiting = sum(
            module.wgrad_store.context.qsize() for module in QueuedWeightGrads(chunk)._modules
        )
        weights(stage, mb)
        moved.append(
            waiting
            - sum(
                module.wgrad_store.context.qsize() for module in QueuedWeightGrads(chunk)._modules
            )
        )

    monkeypatch.setattr(AutogradStage, "weights", counted)
    virtual.pipelined()
    modules = len(QueuedWeightGrads(virtual.chunks[0][0])._modules)
    assert modules == 4  # qkv, proj, fc1, fc2 of the one layer
    assert moved and set(moved) == {modules}
