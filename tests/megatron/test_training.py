"""Training through the real Trainer: layouts agree, checkpoints resume, broken input is named."""

import dataclasses
import json
import re
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
from mhc_megatron.training.overrides import apply_overrides
from mhc_megatron.training.verify import configuration_difference

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
        mhc=MHCConfig(contraction="learned", sinkhorn_iterations=3),
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


@pytest.mark.parametrize("overrides", [[], ["mhc.variant=single_pass", "mhc.contraction=read"]])
def test_a_checkpoint_of_pp2_resumes_under_tp2(
    overrides: list[str], workers: WorkerPool, config: TrainConfig, tmp_path: Path
) -> None:
    config = apply_overrides(config, overrides)
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


@pytest.mark.one_core
@pytest.mark.parametrize("schedule", ["dualpipe_v", "dualpipe"])
def test_a_rank_that_dies_in_a_step_is_named(schedule: str, config: TrainConfig) -> None:
    layout = ParallelConfig(pipeline=2, schedule=schedule)  # type: ignore[arg-type]
    config = dataclasses.replace(config, parallel=layout, micro_batch_size=1, timeout_minutes=1)
    pool = WorkerPool(2)
    failures = pool.failures(training.die_in_a_step, 2, config, 1, expected=2)
    assert failures[1] == "died with exit status 7"
    # Its neighbour waits for a message then, or has one on the way.
    named = (
        r"ExecutionError: pipeline rank 0 failed at "
        r"((post|recv) \w+ from|send \w+ to) 1: TransferError: "
    )
    assert re.search(named, failures[0]), failures[0]


def newest(config: TrainConfig) -> Path:
    return sorted(Path(config.out, "checkpoints").glob("step_*"))[-1]


def refusal(workers: WorkerPool, config: TrainConfig) -> str:
    with pytest.raises(WorkerFailed) as caught:
        workers.run(training.train_steps, config.parallel.world_size, config, 4)
    [line] = [x for x in str(caught.value).splitlines() if "errors.UserError: " in x]
    return line.partition("UserError: ")[2]


def test_a_damaged_checkpoint_is_passed_over(
    workers: WorkerPool, config: TrainConfig, lone_workers: list[WorkerPool]
) -> None:
    config = under(config, tensor=2)  # each rank verifies a part
    run(workers, config, 1, save=True)
    run(workers, config, 2, save=True)
    [whole, _] = workers.run(training.resumed_losses, 2, config, 3)
    old, new = sorted(Path(config.out, "checkpoints").iterdir())
    shard = flip_a_bit(new)
    [fallen_back, silent] = workers.run(training.resumed_losses, 2, config, 3)
    assert fallen_back.warnings == [
        f"checkpoint {new} is damaged: {shard.name} has other contents than were saved; "
        f"resuming from {old} instead"
    ]
    assert silent.warnings == whole.warnings == []
    assert len(fallen_back.losses) == 2 and fallen_back.losses[1:] == whole.losses

    run(workers, config, 2, save=True)  # the step is written again, whole
    [again, _] = workers.run(training.resumed_losses, 2, config, 3)
    assert again == whole

    (new / "manifest.json").unlink()
    with (old / shard.name).open("r+b") as file:
        file.truncate(100)
    message = refusal(lone_workers[0], under(config))
    assert message.startswith(
        f"no whole checkpoint is left in {old.parent}: checkpoint {new} is damaged: manifest.json "
        f"is missing; checkpoint {old} is damaged: {shard.name} has 100 bytes instead of "
    )
    assert message.endswith("or remove these folders to start from step 0")


def test_damaged_checkpoints_do_not_count_as_kept(workers: WorkerPool, config: TrainConfig) -> None:
    """The one before the damaged stays when the next is saved, and is there to go on from."""
    assert config.keep_checkpoints == 2
    folder = Path(config.out, "checkpoints")
    run(workers, config, 1, save=True)
    run(workers, config, 2, save=True)
    flip_a_bit(newest(config))
    run(workers, config, 3, save=True)
    kept = [path.name for path in sorted(folder.iterdir())]
    assert kept == ["step_00000001", "step_00000002", "step_00000003"]
    flip_a_bit(newest(config))
    [fallen_back] = workers.run(training.resumed_losses, 1, config, 4)
    assert len(fallen_back.losses) == 3
    assert fallen_back.warnings[0].endswith("; resuming from " + str(folder / kept[0]) + " instead")

    run(workers, config, 4, save=True)
    run(workers, config, 5, save=True)  # two whole ones: all before them go
    assert [path.name for path in sorted(folder.iterdir())] == ["step_00000004", "step_00000005"]


def flip_a_bit(checkpoint: Path) -> Path:
    """Damage a shard, which keeps its size."""
    shard = max(checkpoint.glob("*.distcp"))
    contents = bytearray(shard.read_bytes())
    contents[len(contents) // 2] ^= 1
    shard.write_bytes(contents)
    return shard


def test_a_checkpoint_without_checksums_is_loaded(workers: WorkerPool, config: TrainConfig) -> None:
    run(workers, config, 1, save=True)
    manifest = newest(config) / "manifest.json"
    content = json.loads(manifest.read_text())
    assert content["sha256"].keys() == content["files"].keys()
    del content["sha256"]
    manifest.write_text(json.dumps(content))
    [resumed] = workers.run(training.resumed_losses, 1, config, 2)
    assert len(resumed.losses) == 1
    assert resumed.warnings == [
        f"checkpoint {newest(config)} is of before checksums were saved: only its file sizes are "
        "checked"
    ]


@pytest.mark.parametrize("limit", [100, 20_000], ids=["what_rank_0_writes", "a_shard"])
def test_a_full_disk_leaves_the_checkpoint_before(
    limit: int, config: TrainConfig, lone_workers: list[WorkerPool]
) -> None:
    pool, survivor = lone_workers
    run(pool, config, 1, save=True)
    before = {path.name: path.read_bytes() for path in newest(config).iterdir()}
    with pytest.raises(WorkerFailed) as caught:
        pool.run(training.save_on_a_full_disk, 1, config, 2, limit)
    [line] = [x for x in str(caught.value).splitlines() if "errors.UserError: " in x]
    folder = newest(config).parent
    assert re.search(
        rf"checkpoint {folder}/step_00000002 cannot be written: .* MiB are free in {folder}\); the "
        "checkpoints before it are intact. Make room there, ",
        line,
    )
    assert [path.name for path in folder.iterdir()] == ["step_00000001"]
    assert before == {path.name: path.read_bytes() for path in newest(config).iterdir()}
    assert len(run(survivor, config, 2, save=True)) == 1


@pytest.mark.one_core
def test_a_checkpoint_of_another_configuration_names_the_field(
    config: TrainConfig, lone_workers: list[WorkerPool]
) -> None:
    run(lone_workers[0], config, 1, save=True)
    written = newest(config) / "train_config.json"
    original = json.loads(written.read_text())
    assert configuration_difference(newest(config), config) is None
    for section, field, value in (
        ("model", "ffn_hidden_size", 128),
        ("mhc", "num_streams", 2),
        ("data", "tokenizer", "x"),
    ):
        changed = {**original[section], field: value}
        written.write_text(json.dumps({**original, section: changed}))
        found = configuration_difference(newest(config), config)
        assert found is not None and f"was saved with {section}.{field}={value!r}" in found

    # A field that did not exist when it was saved had its default.
    younger = {name: value for name, value in original["mhc"].items() if name != "variant"}
    written.write_text(json.dumps({**original, "mhc": younger}))
    assert configuration_difference(newest(config), config) is None
    single_pass = dataclasses.replace(config, mhc=MHCConfig(variant="single_pass"))
    found = configuration_difference(newest(config), single_pass)
    assert found is not None and "was saved with mhc.variant='two_pass', this run has" in found

    written.write_text(json.dumps(original, indent=2))
    assert "was saved with mhc.variant='two_pass'" in refusal(lone_workers[1], single_pass)


@pytest.mark.one_core
def test_a_loss_that_is_not_a_number_stops_the_run(
    config: TrainConfig, lone_workers: list[WorkerPool]
) -> None:
    workers, _ = lone_workers
    run(workers, config, 1, save=True)
    burning = dataclasses.replace(config, optimizer=OptimizerConfig(lr=1e30, warmup_steps=0))
    message = refusal(workers, burning)
    assert "at step" in message and "rank 0" in message and "last checkpoint is intact" in message
    assert newest(config).name == "step_00000001"


@pytest.mark.one_core
def test_a_wrong_number_of_processes_is_named(workers: WorkerPool, config: TrainConfig) -> None:
    with pytest.raises(WorkerFailed, match="2 processes run, but the layout needs tensor 1 x"):
        workers.run(training.train_steps, 2, config, 1)
