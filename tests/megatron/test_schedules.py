"""Our executor's schedules on real GPT models equal the single process, bit for bit.

Each schedule takes the backwards and the weight gradients of a stage in the order of the
micro-batches, as the single process does, so no sum has another order. Bidirectional DualPipe has
two copies of a stage, each with the sum of its half: its single process adds up in halves, too.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import layouts
from helpers.oracle import (
    DENSE,
    EXACT,
    MODELS,
    MOE,
    MTP,
    SUMMATION_ORDER,
    Oracle,
    check,
    run_config,
)
from helpers.pool import WorkerPool
from megatron.core import __version__ as core_version
from packaging.version import Version

NUM_MB = 8

# name: (layout, what else differs, largest relative error of any gradient)
SCHEDULES: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "pp2_zb_h1": ({"pipeline": 2, "schedule": "zb_h1"}, {}, EXACT),
    "pp2_dualpipe_v": ({"pipeline": 2, "schedule": "dualpipe_v"}, {}, EXACT),
    "pp4_zb_h1": ({"pipeline": 4, "schedule": "zb_h1"}, {}, EXACT),
    "pp4_dualpipe_v": ({"pipeline": 4, "schedule": "dualpipe_v"}, {}, EXACT),
    # Nothing to postpone: the checkpoints run their whole backward at once.
    "pp2_dualpipe_v_full_recompute": (
        {"pipeline": 2, "schedule": "dualpipe_v"},
        {"recompute": "full"},
        EXACT,
    ),
    "dp2_pp2_dualpipe_v_distributed_optimizer": (
        {"data": 2, "pipeline": 2, "schedule": "dualpipe_v", "distributed_optimizer": True},
        {},
        SUMMATION_ORDER,
    ),
    "pp2_dualpipe": ({"pipeline": 2, "schedule": "dualpipe"}, {}, EXACT),
    "pp4_dualpipe": ({"pipeline": 4, "schedule": "dualpipe"}, {}, EXACT),
    "dp2_pp2_dualpipe_distributed_optimizer": (
        {"data": 2, "pipeline": 2, "schedule": "dualpipe", "distributed_optimizer": True},
        {},
        SUMMATION_ORDER,
    ),
    "pp2_dualpipe_v_uneven": (
        {
            "pipeline": 2,
            "schedule": "dualpipe_v",
            "first_stage_layers": 3,
            "last_stage_layers": 1,
        },
        {},
        EXACT,
    ),
    "pp2_dualpipe_uneven": (
        {"pipeline": 2, "schedule": "dualpipe", "first_stage_layers": 3, "last_stage_layers": 5},
        {},
        EXACT,
    ),
    "pp4_zb_h1_uneven": ({"pipeline": 4, "schedule": "zb_h1", "last_stage_layers": 2}, {}, EXACT),
    "tp2_sp_pp2_dualpipe": (
        {"tensor": 2, "sequence": True, "pipeline": 2, "schedule": "dualpipe"},
        {},
        SUMMATION_ORDER,
    ),
    "tp2_sp_pp2_dualpipe_v_overlap": (
        {
            "tensor": 2,
            "sequence": True,
            "pipeline": 2,
            "schedule": "dualpipe_v",
            "overlap": "post",
        },
        {},
        SUMMATION_ORDER,
    ),
    "tp2_sp_pp2_dualpipe_v": (
        {"tensor": 2, "sequence": True, "pipeline": 2, "schedule": "dualpipe_v"},
        {},
        SUMMATION_ORDER,
    ),
}


@pytest.fixture(scope="module")
def oracles() -> dict[str, Oracle]:
    return {}


def oracle(
    name: str,
    layout: dict[str, Any],
    workers: WorkerPool,
    oracles: dict[str, Oracle],
    folder: Any,
) -> Oracle:
    halves = layout["schedule"] == "dualpipe"
    key = f"{name}_in_halves" if halves else name
    if key not in oracles:
        config = run_config(MODELS[name], global_batch_size=NUM_MB)
        oracles[key] = Oracle(workers, config, folder.mktemp(key), halves=halves)
    return oracles[key]


@pytest.mark.parametrize("name", SCHEDULES)
def test_dense(
    name: str,
    workers: WorkerPool,
    oracles: dict[str, Oracle],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
) -> None:
    layout, options, tolerance = SCHEDULES[name]
    single = oracle("dense", layout, workers, oracles, tmp_path_factory)
    config = run_config(DENSE, layout, global_batch_size=NUM_MB, **options)
    losses, errors = single.errors(workers, config, tmp_path / "g")
    check(losses, errors, tolerance, loss_tolerance=1e-6 if tolerance else 0.0)


if Version(core_version) >= Version("0.17"):  # test_layouts.py: older ones refuse it without TE

    @pytest.mark.parametrize(
        "name",
        [
            "pp2_zb_h1",
            "pp2_dualpipe_v",
            "pp2_dualpipe",
            "pp4_zb_h1",
            "pp4_dualpipe_v",
            "pp4_dualpipe",
        ],
    )
    def test_moe(
        name: str,
        workers: WorkerPool,
        oracles: dict[str, Oracle],
        tmp_path_factory: pytest.TempPathFactory,
        tmp_path: Path,
    ) -> None:
        layout, _, tolerance = SCHEDULES[name]
        single = oracle("moe", layout, workers, oracles, tmp_path_factory)
        config = run_config(MOE, layout, global_batch_size=NUM_MB)
        losses, errors = single.errors(workers, config, tmp_path / "g")
        check(losses, errors, tolerance, loss_tolerance=0.0)

    def test_experts_are_exchanged_within_one_direction(
        workers: WorkerPool,
        oracles: dict[str, Oracle],
        tmp_path_factory: pytest.TempPathFactory,
        tmp_path: Path,
    ) -> None:
        layout = {"data": 2, "expert": 2, "pipeline": 2, "schedule": "dualpipe"}
        single = oracle("moe", layout, workers, oracles, tmp_path_factory)
        config = run_config(MOE, layout, global_batch_size=NUM_MB)
        losses, errors = single.errors(workers, config, tmp_path / "g")
        check(losses, errors, SUMMATION_ORDER, loss_tolerance=1e-6)


@pytest.mark.parametrize("name", ["pp2_dualpipe_v", "pp2_dualpipe"])
def test_bf16(name: str, workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Megatron casts the last stage's output, wherever that stage is."""
    folder = tmp_path_factory.mktemp("bf16")
    optimizer = {"distributed_optimizer": True}
    one = run_config(DENSE, optimizer, global_batch_size=NUM_MB, dtype="bf16")
    layout = {**SCHEDULES[name][0], **optimizer}
    two = run_config(DENSE, layout, global_batch_size=NUM_MB, dtype="bf16")
    losses, errors = Oracle(workers, one, folder, halves=name == "pp2_dualpipe").errors(
        workers, two, folder / "g"
    )
    check(losses, errors, EXACT, loss_tolerance=0.0)


def take_means(chunks: list[torch.nn.Module]) -> None:
    """Losses as means over micro-batches and replicas, not over the tokens of the step."""
    chunks[0].config.calculate_per_token_loss = False


@pytest.mark.parametrize("name", ["pp2_dualpipe_v", "pp2_dualpipe"])
def test_mean_loss(
    name: str,
    workers: WorkerPool,
    oracles: dict[str, Oracle],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
) -> None:
    layout = SCHEDULES[name][0]
    single = oracle("dense", layout, workers, oracles, tmp_path_factory)
    config = run_config(DENSE, layout, global_batch_size=NUM_MB)
    one = run_config(DENSE, global_batch_size=NUM_MB)
    left, right = tmp_path / "left", tmp_path / "right"
    for folder, run, size in ((left, config, 2), (right, one, 1)):
        folder.mkdir()
        arguments = (run, str(single.initial), str(folder), take_means)
        workers.run(layouts.losses_and_gradients, size, *arguments)
    [errors] = workers.run(layouts.differences, 1, str(left), str(right))
    # The loop does not add up in halves here.
    check([], errors, EXACT if name == "pp2_dualpipe_v" else SUMMATION_ORDER, loss_tolerance=0.0)
    [others] = workers.run(layouts.differences, 1, str(right), str(single.gradients))
    assert min(others.values()) > SUMMATION_ORDER, "the mean of means is another loss"


@pytest.mark.parametrize(
    "layout",
    [
        {"pipeline": 2, "schedule": "one_f_one_b"},
        {"pipeline": 2, "schedule": "zb_h1"},
        {"pipeline": 4, "schedule": "zb_h1"},
    ],
    ids=lambda layout: f"pp{layout['pipeline']}_{layout['schedule']}",
)
def test_mtp(
    layout: dict[str, Any],
    workers: WorkerPool,
    oracles: dict[str, Oracle],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
) -> None:
    single = oracle("mtp", layout, workers, oracles, tmp_path_factory)
    config = run_config(MTP, layout, global_batch_size=NUM_MB)
    losses, errors = single.errors(workers, config, tmp_path / "g")
    # The MTP stage's share of the embedding gradient is added at the end.
    check(losses, errors, SUMMATION_ORDER, loss_tolerance=0.0)
