"""Training through the real Trainer: layouts agree, checkpoints resume, broken input is named."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import training
from helpers.pool import WorkerFailed, WorkerPool

from mhc_megatron.config import MHCConfig
from mhc_megatron.training.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)

# Float32 sums in another order (6e-8 each), carried through three Adam steps.
AFTER_STEPS = 2e-5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    train, valid = training.corpus(tmp_path_factory.mktemp("corpus"))
    return DataConfig(train=train, valid=valid)


@pytest.fixture
def lone_workers() -> Iterator[list[WorkerPool]]:
    """Pools of one process for tests whose jobs fail: a pool does not survive that."""
    pools = [WorkerPool(1) for _ in range(2)]
    yield pools
    for pool in pools:
        pool.close()


@pytest.fixture
def config(data: DataConfig, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            num_layers=4, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, seq_length=32
        ),
        mhc=MHCConfig(contraction="learned"),
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2),
        data=data,
        steps=6,
        micro_batch_size=2,
        global_batch_size=4,
        eval_iters=1,
        out=str(tmp_path / "run"),
    )


def under(config: TrainConfig, out: Path | None = None, **layout: Any) -> TrainConfig:
    return dataclasses.replace(
        config, parallel=ParallelConfig(**layout), out=str(out) if out else config.out
    )


def run(workers: WorkerPool, config: TrainConfig, until: int, *, save: bool = False) -> list[float]:
    losses = workers.run(training.train_steps, config.parallel.world_size, config, until, save)
    assert all(rank == losses[0] for rank in losses)
    return losses[0]


def close(left: list[float], right: list[float]) -> bool:
    return len(left) == len(right) and all(
        abs(a / b - 1) <= AFTER_STEPS for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor": 2, "sequence": True},
        {"data": 2, "distributed_optimizer": True},
        {"pipeline": 4},
    ],
    ids=["tp2_sp", "dp2_distributed_optimizer", "pp4"],
)
def test_three_steps_equal_single_process(
    layout: dict[str, Any], workers: WorkerPool, config: TrainConfig, tmp_path: Path
) -> None:
    start = under(config, distributed_optimizer=layout.get("distributed_optimizer", False))
    run(workers, start, 1, save=True)  # weights are drawn per stage: share one set
    single = run(workers, start, 4)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    assert close(run(workers, under(config, tmp_path / "other", **layout), 4), single)
    assert single[2] < single[0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resuming_continues_bit_for_bit(
    dtype: Any, workers: WorkerPool, config: TrainConfig
) -> None:
    layout = dataclasses.replace(
        config,
        parallel=ParallelConfig(tensor=2, sequence=True, distributed_optimizer=dtype == "bf16"),
        dtype=dtype,
    )
    whole = run(workers, dataclasses.replace(layout, out=config.out + "-whole"), 6)
    first = run(workers, layout, 3, save=True)
    assert first + run(workers, layout, 6) == whole


def test_a_checkpoint_of_pp2_resumes_under_tp2(
    workers: WorkerPool, config: TrainConfig, tmp_path: Path
) -> None:
    pipeline = under(config, pipeline=2)
    run(workers, pipeline, 3, save=True)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    rest = run(workers, pipeline, 6)
    tensor = under(config, tmp_path / "other", tensor=2, sequence=True)
    assert close(run(workers, tensor, 6), rest)


SCHEDULES = {
    "1f1b": {"pipeline": 2},
    "zb_h1": {"pipeline": 2, "schedule": "zb_h1"},
    "dualpipe_v": {"pipeline": 2, "schedule": "dualpipe_v"},
    "dualpipe": {"pipeline": 2, "schedule": "dualpipe"},
}


@pytest.mark.parametrize(
    ("saved", "resumed", "distributed_optimizer"),
    [
        ("dualpipe_v", "1f1b", False),
        ("1f1b", "dualpipe_v", False),
        ("zb_h1", "dualpipe_v", True),
        ("dualpipe_v", "dualpipe", False),
        ("dualpipe", "1f1b", False),
        ("dualpipe", "dualpipe_v", True),
    ],
)
def test_checkpoints_do_not_depend_on_the_schedule(
    saved: str,
    resumed: str,
    distributed_optimizer: bool,
    workers: WorkerPool,
    config: TrainConfig,
    tmp_path: Path,
) -> None:
    config = dataclasses.replace(config, micro_batch_size=1)
    optimizer = {"distributed_optimizer": distributed_optimizer}
    first = under(config, **SCHEDULES[saved], **optimizer)
    run(workers, first, 3, save=True)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    rest = run(workers, first, 6)
    second = under(config, tmp_path / "other", **SCHEDULES[resumed], **optimizer)
    other = run(workers, second, 6)
    # The gradient norm is summed over ranks that hold other parameters, and scales every gradient.
    assert close(other, rest)


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_copies_of_a_stage_count_once_and_stay_equal(
    distributed_optimizer: bool, workers: WorkerPool, config: TrainConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, micro_batch_size=1, global_batch_size=8)
    start = under(config, distributed_optimizer=distributed_optimizer)
    run(workers, start, 1, save=True)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    layout = {"pipeline": 4, "schedule": "dualpipe"}
    two_ways = under(
        config, tmp_path / "other", distributed_optimizer=distributed_optimizer, **layout
    )
    [(norms, loss, _)] = workers.run(training.norms_and_parameters, 1, start, 4)
    ranks = workers.run(training.norms_and_parameters, 4, two_ways, 4)
    for found, other_loss, _ in ranks:
        assert found == pytest.approx(norms, rel=AFTER_STEPS)
        assert other_loss == pytest.approx(loss, rel=AFTER_STEPS)
    # Megatron's order of processes: replicas are neighbours.
    parameters = [rank[2] for rank in ranks]
    assert parameters[0] == parameters[1] and parameters[2] == parameters[3]
    assert parameters[0].keys() != parameters[2].keys()  # embedding and output layer


def test_the_distributed_optimizer_reshards(
    workers: WorkerPool, config: TrainConfig, tmp_path: Path
) -> None:
    two = under(config, data=2, distributed_optimizer=True)
    run(workers, two, 3, save=True)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    rest = run(workers, two, 6)
    one = under(config, tmp_path / "other", tensor=2, distributed_optimizer=True)
    assert close(run(workers, one, 6), rest)


def test_a_run_killed_while_saving_resumes_from_the_last_whole_checkpoint(
    config: TrainConfig, lone_workers: list[WorkerPool]
) -> None:
    pool, survivor = lone_workers
    run(pool, config, 2, save=True)
    with pytest.raises(WorkerFailed, match="died with exit status 9"):
        pool.run(training.die_while_saving, 1, config, 4)
    folders = sorted(path.name for path in Path(config.out, "checkpoints").iterdir())
    assert folders == [".partial-step_00000004", "step_00000002"]
    resumed = run(survivor, config, 6, save=True)
    assert len(resumed) == 4


def newest(config: TrainConfig) -> Path:
    return sorted(Path(config.out, "checkpoints").glob("step_*"))[-1]


def refusal(workers: WorkerPool, config: TrainConfig) -> str:
    with pytest.raises(WorkerFailed) as caught:
        workers.run(training.train_steps, config.parallel.world_size, config, 4)
    [line] = [x for x in str(caught.value).splitlines() if "errors.UserError: " in x]
    return line.partition("UserError: ")[2]


def test_a_damaged_checkpoint_is_named(config: TrainConfig, lone_workers: list[WorkerPool]) -> None:
    workers, others = lone_workers
    run(workers, config, 1, save=True)
    shard = max(newest(config).iterdir(), key=lambda path: path.stat().st_size)
    with shard.open("r+b") as file:
        file.truncate(100)
    assert f"{shard.name} has 100 bytes instead of" in refusal(workers, config)
    shard.unlink()
    assert f"{shard.name} is missing" in refusal(others, config)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("model", "ffn_hidden_size", 128), ("mhc", "num_streams", 2), ("data", "tokenizer", "x")],
)
def test_a_checkpoint_of_another_configuration_names_the_field(
    section: str, field: str, value: Any, config: TrainConfig, lone_workers: list[WorkerPool]
) -> None:
    workers, _ = lone_workers
    run(workers, config, 1, save=True)
    written = newest(config) / "train_config.json"
    saved = json.loads(written.read_text())
    saved[section][field] = value
    written.write_text(json.dumps(saved, indent=2))
    manifest = newest(config) / "manifest.json"
    sizes = json.loads(manifest.read_text())
    sizes["files"][written.name] = written.stat().st_size
    manifest.write_text(json.dumps(sizes))
    assert f"was saved with {section}.{field}={value!r}" in refusal(workers, config)


def test_a_loss_that_is_not_a_number_stops_the_run(
    config: TrainConfig, lone_workers: list[WorkerPool]
) -> None:
    workers, _ = lone_workers
    run(workers, config, 1, save=True)
    burning = dataclasses.replace(config, optimizer=OptimizerConfig(lr=1e30, warmup_steps=0))
    message = refusal(workers, burning)
    assert "at step" in message and "rank 0" in message and "last checkpoint is intact" in message
    assert newest(config).name == "step_00000001"


def test_a_wrong_number_of_processes_is_named(workers: WorkerPool, config: TrainConfig) -> None:
    with pytest.raises(WorkerFailed, match="2 processes run, but the layout needs tensor 1 x"):
        workers.run(training.train_steps, 2, config, 1)
