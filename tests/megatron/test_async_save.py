"""Checkpoints written in the background: the bits of synchronous ones, and no fault costs one."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import background, training
from helpers.pool import WorkerPool

from mhc_megatron.training.config import DataConfig, ModelConfig, ParallelConfig, TrainConfig
from mhc_megatron.training.guard import GuardConfig
from mhc_megatron.training.manifest import read_manifest, wrong_checksum, wrong_size


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    train, valid = training.corpus(tmp_path)
    return TrainConfig(
        model=ModelConfig(
            num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, seq_length=32
        ),
        parallel=ParallelConfig(data=2, distributed_optimizer=True),
        data=DataConfig(train=train, valid=valid),
        steps=4,
        micro_batch_size=2,
        global_batch_size=4,
        eval_interval=0,
        eval_iters=1,
        save_interval=1,
        keep_checkpoints=9,
        async_save=True,
        out=str(tmp_path / "run"),
    )


def synchronous(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, async_save=False, out=config.out + "-synchronous")


def checkpoints(config: TrainConfig) -> list[Path]:
    return sorted((Path(config.out) / "checkpoints").iterdir())


def tensors(checkpoint: Path) -> dict[str, bytes]:
    """All that Megatron has written, but its table of contents, which has a random number."""
    files = [*checkpoint.glob("*.distcp"), *checkpoint.glob("common.pt")]
    return {path.name: path.read_bytes() for path in files}


def require_whole(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    assert not isinstance(manifest, str) and manifest.checksums is not None
    assert manifest.sizes.keys() == {path.name for path in checkpoint.iterdir()} - {"manifest.json"}
    assert wrong_size(checkpoint, manifest) is None
    assert wrong_checksum(checkpoint, manifest, manifest.sizes) is None


def require_equal(found: Path, wanted: Path) -> None:
    require_whole(found)
    assert {path.name for path in found.iterdir()} == {path.name for path in wanted.iterdir()}
    assert list(found.glob("*.distcp"))
    assert tensors(found) == tensors(wanted)


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        ("fp32", {"tensor": 2, "sequence": True}),
        ("bf16", {"data": 2, "distributed_optimizer": True}),
    ],
)
def test_what_is_saved_is_the_state_before_training_went_on(
    dtype: Any, layout: dict[str, Any], workers: WorkerPool, config: TrainConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, dtype=dtype, parallel=ParallelConfig(**layout))
    wanted = synchronous(config)
    [first, _] = workers.run(training.train_steps, 2, wanted, 2, True)
    [rest, _] = workers.run(training.train_steps, 2, wanted, 4)
    [(losses, meanwhile, after), _] = workers.run(
        background.train_on_meanwhile, 2, config, tmp_path / "gate"
    )
    assert losses == first + rest
    assert meanwhile == [] and after == ["step_00000002"]
    [found], [expected] = checkpoints(config), checkpoints(wanted)
    require_equal(found, expected)
    [resumed, _] = workers.run(training.train_steps, 2, config, 4)
    assert resumed == rest


def test_a_run_on_a_slow_disk_goes_back_and_ends_as_the_synchronous_one(
    workers: WorkerPool, config: TrainConfig
) -> None:
    config = dataclasses.replace(config, steps=5, guard=GuardConfig(max_rollbacks=1))
    spoilt = {3: float("nan")}  # step 4, while the checkpoint of step 3 is on its way
    wanted = synchronous(config)
    expected = workers.run(training.spoil_steps, 2, wanted, spoilt)
    assert list(expected[0][0]) == [1, 2, 3, 5] and expected[0][1] == ""
    assert workers.run(background.slowly_written, 2, config, spoilt) == expected
    found = checkpoints(config)
    assert [path.name for path in found] == [path.name for path in checkpoints(wanted)]
    for left, right in zip(found, checkpoints(wanted), strict=True):
        require_equal(left, right)


@pytest.mark.one_core
def test_a_number_that_is_not_finite_or_a_signal_finds_the_last_checkpoint_published(
    workers: WorkerPool, config: TrainConfig
) -> None:
    [(losses, message), _] = workers.run(background.slowly_written, 2, config, {2: float("nan")})
    assert list(losses) == [1, 2] and "loss is nan at step 3" in message
    assert [path.name for path in checkpoints(config)] == ["step_00000001", "step_00000002"]
    told = dataclasses.replace(config, out=config.out + "-told", save_interval=0)
    assert workers.run(background.stopped, 2, told) == [["step_00000001"]] * 2


def test_a_rank_killed_during_the_background_write_costs_no_published_checkpoint(
    workers: WorkerPool, config: TrainConfig
) -> None:
    config = dataclasses.replace(config, steps=3)
    whole = synchronous(config)
    expected = workers.run(training.spoil_steps, 2, whole, {})[0]
    pool = WorkerPool(2)
    # In step 3; the writers of step 2 have not come to their end.
    failures = pool.failures(background.die_meanwhile, 2, config, expected=2)
    assert failures[1] == "died with exit status -9"
    assert re.search(r"HangError: stalled or gone: .*rank 1 \(", failures[0]), failures[0]
    partial, first = checkpoints(config)
    assert partial.name.startswith(".partial-step_00000002-") and first.name == "step_00000001"
    require_equal(first, checkpoints(whole)[0])

    assert workers.run(training.spoil_steps, 2, config, {})[0] == expected
    assert [path.name for path in checkpoints(config)] == [f"step_{n:08d}" for n in (1, 2, 3)]
    for checkpoint in checkpoints(config):
        require_whole(checkpoint)


def test_a_full_disk_in_the_background_ends_the_run_with_the_checkpoint_before(
    workers: WorkerPool, config: TrainConfig
) -> None:
    config = dataclasses.replace(config, parallel=ParallelConfig(tensor=2))
    messages = workers.run(background.full_disk, 2, config)
    folder = Path(config.out) / "checkpoints"
    for message in messages:
        assert re.fullmatch(
            rf"checkpoint {folder}/step_00000002 cannot be written: .* MiB are free in {folder}\); "
            "the checkpoints before it are intact. Make room there, .*",
            message,
        )
    [kept] = checkpoints(config)
    assert kept.name == "step_00000001"
    require_whole(kept)


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "stalled"])
def test_a_writer_that_does_not_end_is_an_error_and_no_hang(
    killed: bool, workers: WorkerPool, config: TrainConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, parallel=ParallelConfig())
    [(message, left)] = workers.run(background.never_written, 1, config, tmp_path / "gate", killed)
    if killed:
        assert "its background writer was killed, as where memory is short" in message
        assert left == ["step_00000001"]
    else:
        assert "was not written in the background within timeout_minutes=0.05" in message
        assert [name for name in left if not name.startswith(".")] == ["step_00000001"]
    assert f"{config.out}/checkpoints/step_00000002" in message
    assert "the checkpoints before it are intact" in message
