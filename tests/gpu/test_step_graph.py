"""Steps that are one CUDA graph have the bits of steps that are launched kernel by kernel, and
overlapped ones those of steps without overlap."""

import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import engine
from helpers.training import corpus
from megatron.core.tensor_parallel.random import initialize_rng_tracker

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.megatron.step_graph import EAGER_STEPS, StepGraph
from mhc_megatron.training.config import DataConfig, OptimizerConfig
from mhc_megatron.training.trainer import Trainer

LANES: dict[str, Any] = {
    "layers": 4,
    "schedule": "dualpipe_v",
    "mhc": MHCConfig(recompute="auto"),
}
STEPS = EAGER_STEPS + 4
VALIDATED_AFTER = EAGER_STEPS + 2
CASES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "recompute": {"mhc": MHCConfig(recompute="auto")},
    "single_pass": {"mhc": MHCConfig(variant="single_pass")},
    "local": {"impl": "local"},
    "mla": {"model": "mla"},
    "padded experts": {"model": "padded"},
    "overlap": {**LANES, "overlap": "all"},
    "overlap of padded experts": {**LANES, "overlap": "all", "model": "padded"},
    **{recipe: {"recipe": recipe} for recipe in engine.RECIPES if recipe is not None},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    train, valid = corpus(tmp_path_factory.mktemp("corpus"), documents=600)
    return DataConfig(train=train, valid=valid)


@pytest.fixture(autouse=True)
def _states_on_the_gpu() -> Iterator[None]:
    initialize_rng_tracker(use_cudagraphable_rng=True, force_reset=True)
    yield
    initialize_rng_tracker(force_reset=True)
    engine.set_seed(1)


def run(data: DataConfig, folder: Path, *, graph: bool, **case: Any) -> tuple[list[Any], Trainer]:
    """Losses and gradient norms of all steps, with a validation's loss between; the trainer."""
    engine.forget()
    engine.set_seed(1)
    config = dataclasses.replace(
        engine.run_config(case.pop("model", "dense"), **case),
        data=data,
        optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-3, warmup_steps=2),
        steps=STEPS,
        global_batch_size=4,  # pairs of an overlap between its first and its last
        eval_iters=1,
        cuda_graph=graph,
        out=str(folder),
    )
    trainer, found = Trainer(config), []
    for step in range(STEPS):
        metrics = trainer.step(step)
        found.append((metrics.loss, metrics.grad_norm))
        if step + 1 == VALIDATED_AFTER:
            found.append(trainer.evaluate()[0])
    return found, trainer


@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_eager_steps(name: str, data: DataConfig, tmp_path: Path) -> None:
    case = CASES[name]
    alone = {key: value for key, value in case.items() if key != "overlap"}
    expected, _ = run(data, tmp_path / "eager", graph=False, **alone)
    found, trainer = run(data, tmp_path / "graph", graph=True, **case)
    assert found == expected
    assert len({loss for loss in found if isinstance(loss, tuple)}) == STEPS
    assert isinstance(trainer.forward_backward, StepGraph)
    # From the loaded parameters on, the same steps again: nothing of the old graph is left.
    trainer.save(STEPS)
    trainer.resume()
    after = [trainer.step(STEPS - 1).loss for _ in range(EAGER_STEPS + 2)]
    assert len(set(after)) == len(after)
    trainer.forward_backward.forget()
    gc.collect()


def test_a_step_that_asks_the_gpu_is_refused() -> None:
    def function(*, data_iterator: Any, **_: Any) -> list[Any]:
        [batches] = data_iterator
        return [float(batch["x"].sum()) for batch in batches]

    step = StepGraph(function)
    for _ in range(EAGER_STEPS):
        batch = {"x": torch.ones(2, device="cuda")}
        assert step(data_iterator=iter([batch]), num_microbatches=1) == [2.0]
    state = torch.cuda.get_rng_state()
    expected = torch.rand(8, device="cuda")
    torch.cuda.set_rng_state(state)
    with pytest.raises(UserError, match=r"cannot be captured: .*set cuda_graph=False"):
        step(data_iterator=iter([batch]), num_microbatches=1)
    # Random numbers go on where they were.
    assert torch.equal(torch.rand(8, device="cuda"), expected)


def test_micro_batches_of_another_shape_are_refused() -> None:
    def function(*, data_iterator: Any, **_: Any) -> list[Any]:
        [batches] = data_iterator
        return [batch["x"].sum() for batch in batches]

    step = StepGraph(function)
    for size in (2, 2, 2, 2):
        batch = {"x": torch.full((size,), float(size), device="cuda")}
        assert float(step(data_iterator=iter([batch]), num_microbatches=1)[0]) == size**2
    with pytest.raises(UserError, match=r"x of a micro-batch has shape \(3,\)"):
        step(data_iterator=iter([{"x": torch.ones(3, device="cuda")}]), num_microbatches=1)
