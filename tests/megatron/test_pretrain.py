"""Megatron's own training loop with hyper-connections: our trainer's numbers, and what it refuses.

Collected where megatron-core has the loop (conftest.py); test_pretrain_options.py runs everywhere.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
from helpers import pretrain, training
from helpers.oracle import FLEX
from helpers.pool import WorkerPool

from mhc_megatron.config import MHCConfig
from mhc_megatron.pretrain.options import mhc_options
from mhc_megatron.report.tensorboard import gain_scalars
from mhc_megatron.training.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)

# Megatron adds up the micro-batches' losses in float32, our trainer in float64.
_LOSS = 3e-7


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    train, valid = training.corpus(tmp_path_factory.mktemp("corpus"))
    return DataConfig(train=train, valid=valid)


@pytest.fixture
def config(data: DataConfig, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, seq_length=32
        ),
        # Two iterations leave gain magnitudes that differ from 1.
        mhc=MHCConfig(num_streams=3, sinkhorn_iterations=2, contraction="learned", init_gate=0.5),
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=0),
        data=data,
        steps=3,
        micro_batch_size=2,
        global_batch_size=8,
        eval_iters=1,
        out=str(tmp_path / "ours"),
    )


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({}, id="single"),
        pytest.param({"tensor": 2, "sequence": True}, id="TP2"),
        pytest.param({"pipeline": 2}, id="PP2"),
        pytest.param({"pipeline": 2, "schedule": "zb_h1"}, id="ZB-H1"),
        pytest.param({"pipeline": 2, "schedule": "dualpipe_v"}, id="DualPipeV"),
        pytest.param(
            {
                "tensor": 2,
                "sequence": True,
                "pipeline": 2,
                "schedule": "dualpipe_v",
                "overlap": "post",
            },
            id="TP2 with DualPipeV overlapped",
        ),
    ],
)
def test_megatrons_loop_trains_as_our_trainer_does(
    workers: WorkerPool, config: TrainConfig, tmp_path: Path, layout: dict[str, Any]
) -> None:
    parallel = ParallelConfig(**layout)
    num_layers = max(2, parallel.num_stages)
    model = dataclasses.replace(config.model, num_layers=num_layers)
    config = dataclasses.replace(config, parallel=parallel, model=model)
    world_size = config.parallel.world_size
    board = tmp_path / "tensorboard"
    argv = pretrain.arguments(config, board) + pretrain.hyper_connection_flags(config)
    workers.run(pretrain.run_loop, world_size, argv)
    theirs = pretrain.scalars(board)
    steps, valid_loss, gains = workers.run(pretrain.train_here, world_size, config)[0]

    # A gradient norm depends on every bit of the parameters, that is of all steps before.
    norms = [numpy.float32(step["grad_norm"]) for step in steps]
    assert theirs["grad-norm"] == norms
    assert theirs["lm loss"] == pytest.approx([step["loss"] for step in steps], rel=_LOSS)
    assert theirs["lm loss"][0] != theirs["lm loss"][-1]
    assert theirs["lm loss validation"] == pytest.approx([valid_loss], rel=_LOSS)

    found = {tag: theirs[tag] for tag, _ in gain_scalars(gains)}
    assert found == {tag: [numpy.float32(value)] for tag, value in gain_scalars(gains)}
    assert abs(found["gain_composite/backward"][0] - 1) > 1e-4


VEE = {"pipeline": 2, "schedule": "dualpipe_v", "distributed_optimizer": True}
EXPERTS = {**VEE, "data": 2, "expert": 2, "overlap": "all"}


@pytest.mark.parametrize(
    ("model", "layout", "flags"),
    [
        pytest.param({}, VEE, [], id="dense"),
        # Through a stand-in for DeepEP: the flags reach its dispatcher, and overlap takes it.
        pytest.param(FLEX, EXPERTS, ["--moe-enable-deepep"], id="deprecated flag of DeepEP"),
        pytest.param(FLEX, EXPERTS, ["--moe-flex-dispatcher-backend=deepep"], id="DeepEP"),
    ],
)
def test_a_half_precision_step_of_megatrons_loop(
    request: pytest.FixtureRequest,
    config: TrainConfig,
    tmp_path: Path,
    model: dict[str, Any],
    layout: dict[str, Any],
    flags: list[str],
) -> None:
    """One step: gloo gathers a chunk's bf16 and float32 parameters as if they had one dtype."""
    workers: WorkerPool = request.getfixturevalue("deep_ep_workers" if model else "workers")
    config = dataclasses.replace(
        config,
        dtype="bf16",
        steps=1,
        micro_batch_size=1,
        model=dataclasses.replace(config.model, num_layers=4, **model),
        mhc=dataclasses.replace(config.mhc, recompute="auto"),
        parallel=ParallelConfig(**layout),
    )
    board, world_size = tmp_path / "tensorboard", config.parallel.world_size
    argv = [*pretrain.arguments(config, board), *pretrain.hyper_connection_flags(config), *flags]
    workers.run(pretrain.run_loop, world_size, argv)
    theirs = pretrain.scalars(board)
    [step] = workers.run(pretrain.train_here, world_size, config)[0][0]
    assert theirs["grad-norm"] == [numpy.float32(step["grad_norm"])]
    assert theirs["lm loss"] == pytest.approx([step["loss"]], rel=_LOSS)


def test_a_script_with_the_lines_and_one_with_a_spec(
    workers: WorkerPool, config: TrainConfig, tmp_path: Path
) -> None:
    """Two pipeline ranks, with messages of n streams and with shapes before every message."""
    config = dataclasses.replace(config, parallel=ParallelConfig(pipeline=2), steps=2)
    variables = {
        option.variable: str(getattr(config.mhc, option.name))
        for option in mhc_options()
        if hasattr(config.mhc, option.name)
    }
    variables["MHC_LOG_TIMING"] = "1"
    boards = [tmp_path / "lines", tmp_path / "spec"]
    lines, spec = (pretrain.arguments(config, board) for board in boards)
    lines += [*pretrain.hyper_connection_flags(config), "--mhc-log-timing=1"]
    spec += ["--spec", "mhc_megatron.pretrain.spec", "gpt"]
    workers.run(pretrain.run_script, 2, lines, {})
    workers.run(pretrain.run_script, 2, spec, variables)
    by_lines, by_spec = map(pretrain.scalars, boards)
    for tag in ("grad-norm", "lm loss", "lm loss validation"):
        assert by_lines[tag] == by_spec[tag]
    assert "gain_composite/forward" in by_lines
    for tag in ("hyper_connection_ms/forward", "hyper_connection_ms/backward"):
        assert len(by_lines[tag]) == len(by_spec[tag]) == config.steps


def test_a_script_takes_the_schedule_of_the_command(
    workers: WorkerPool, config: TrainConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(
        config, parallel=ParallelConfig(pipeline=2, schedule="one_f_one_b"), steps=2
    )
    boards = [tmp_path / "script", tmp_path / "command"]
    script, command = (
        pretrain.arguments(config, board) + pretrain.hyper_connection_flags(config)
        for board in boards
    )
    workers.run(pretrain.run_script, 2, script, {})
    workers.run(pretrain.run_loop, 2, command)
    by_script, by_command = map(pretrain.scalars, boards)
    for tag in ("grad-norm", "lm loss", "lm loss validation", "gain_composite/forward"):
        assert by_script[tag] == by_command[tag]


@pytest.mark.parametrize(
    ("layout", "mhc", "kinds"),
    [
        pytest.param(
            {}, {"recompute": "stage"}, ["forward", "backward", "rebuild"], id="recompute"
        ),
        pytest.param({"pipeline": 2}, {}, ["forward", "backward"], id="PP2"),
        pytest.param(
            {}, {"variant": "single_pass"}, ["forward", "backward"], id="single-pass-full"
        ),
    ],
)
def test_times_are_logged_and_change_no_bit(
    workers: WorkerPool,
    config: TrainConfig,
    tmp_path: Path,
    layout: dict[str, int],
    mhc: dict[str, str],
    kinds: list[str],
) -> None:
    """Every second iteration, in the log and in TensorBoard, above 0 and below the iteration's."""
    config = dataclasses.replace(
        config,
        parallel=ParallelConfig(**layout),
        mhc=dataclasses.replace(config.mhc, **mhc),
        steps=4,
    )
    boards = [tmp_path / "plain", tmp_path / "timed"]
    plain, timed = (
        pretrain.arguments(config, board) + pretrain.hyper_connection_flags(config)
        for board in boards
    )
    if config.mhc.variant == "single_pass":  # forwards run again, within the backward
        full = "--recompute-granularity=full --recompute-method=uniform --recompute-num-layers=1"
        plain, timed = plain + full.split(), timed + full.split()
    workers.run(pretrain.run_loop, config.parallel.world_size, plain)
    timed.append("--mhc-log-timing=2")
    logs = workers.run(pretrain.logged_loop, config.parallel.world_size, timed)
    untimed, found = map(pretrain.scalars, boards)

    tags = [f"hyper_connection_ms/{kind}" for kind in kinds]
    assert found.keys() - untimed.keys() == set(tags)
    for tag in ("grad-norm", "lm loss", "lm loss validation", "gain_composite/backward"):
        assert found[tag] == untimed[tag]

    line = re.compile(r"^ hyper-connections in iteration (\d+) \(ms\) \|(.*)\|$", re.MULTILINE)
    assert [line.findall(log) for log in logs[:-1]] == [[]] * (len(logs) - 1)
    said = {int(number): text for number, text in line.findall(logs[-1])}
    assert list(said) == [2, 4]
    step = re.compile(r"iteration +(\d+)/.*elapsed time per iteration \(ms\): ([\d.]+)")
    whole = {int(number): float(ms) for number, ms in step.findall(logs[-1])}
    for place, (iteration, text) in enumerate(said.items()):
        times = [found[tag][place] for tag in tags]
        assert all(value > 0 for value in times)
        assert sum(times) < whole[iteration]
        expected = " |".join(
            f" {kind}: {value:.3f}" for kind, value in zip(kinds, times, strict=True)
        )
        assert text.strip() == expected.strip()


def test_what_does_not_combine_is_refused_before_a_step(
    workers: WorkerPool, config: TrainConfig, tmp_path: Path
) -> None:
    board = tmp_path / "tensorboard"
    base = pretrain.arguments(config, board)
    expected = {
        "--hidden-dropout=0.1": "hidden_dropout=0.1 does not combine with hyper-connections: the "
        "branch output is mixed into n streams without dropout; set hidden_dropout=0",
        "--recompute-granularity=selective --recompute-modules mlp": "recompute_modules=['mlp'] "
        "does not combine with hyper-connections: these are re-run by the stock layer's forward, "
        "which hyper-connections replace; use recompute_modules=['core_attn'] (also moe_act, moe, "
        "mla_up_proj, shared_experts) or recompute_granularity='full'",
        "--mhc-recompute=auto --recompute-granularity=full --recompute-method=uniform "
        "--recompute-num-layers=1": "recompute_granularity='full' does not combine with "
        "recompute='auto' of the hyper-connections: it re-runs whole layers, hyper-connections "
        "included; set recompute='none', or recompute_granularity='selective'",
        "--mhc-schedule=zb_h1": "--mhc-schedule='zb_h1' needs --pipeline-model-parallel-size > 1; "
        "set --mhc-schedule=megatron",
        "--mhc-schedule=dualpipe_v": "--pipeline-model-parallel-size=1 does not combine with "
        "--mhc-schedule=dualpipe_v: Megatron's loop gives a rank two chunks in a pipeline only; "
        "use mhc-megatron train, or --mhc-schedule=megatron",
        "--spec a b": "--spec a b and hyper_connect both choose the layers; leave out --spec",
        "--sft": "--sft is done by Megatron-LM's pretrain_gpt.py and not by mhc-megatron "
        "pretrain; add hyper_connect to that script (docs/megatron.md)",
    }
    told = workers.run(pretrain.refusals, 1, [base + flags.split() for flags in expected])[0]
    for message, start in zip(told, expected.values(), strict=True):
        # Megatron's builder adds which module it was making.
        assert message.removesuffix(" when instantiating MHCTransformerLayer") == start
    assert "lm loss" not in pretrain.scalars(board)


@pytest.mark.parametrize(
    ("layout", "order"),
    [({}, "hook"), ({"pipeline": 2, "schedule": "dualpipe_v"}, "groups")],
    ids=["one chunk", "two chunks"],
)
def test_a_half_precision_checkpoint_keeps_every_state_with_its_parameter(
    workers: WorkerPool, config: TrainConfig, layout: dict[str, Any], order: str
) -> None:
    parallel = ParallelConfig(distributed_optimizer=True, **layout)
    config = dataclasses.replace(
        config,
        dtype="bf16",
        parallel=parallel,
        model=dataclasses.replace(config.model, num_layers=parallel.num_stages),
    )
    for kept in (order, "as built"):
        found = workers.run(pretrain.misplaced_states, parallel.world_size, config, kept)
        assert any(found) == (kept == "as built"), found


def test_a_checkpoint_goes_from_one_schedule_to_another(
    workers: WorkerPool, config: TrainConfig, tmp_path: Path
) -> None:
    """Saved under DualPipeV, resumed under Megatron's 1F1B, saved, and back."""
    vee = ParallelConfig(pipeline=2, schedule="dualpipe_v")
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, num_layers=4), parallel=vee, steps=6
    )
    saved = tmp_path / "saved"
    kept = f"--ckpt-format torch_dist --save {saved} --load {saved} --save-interval 100"

    def run(board: str, parallel: ParallelConfig, *flags: str) -> dict[str, list[float]]:
        run_config = dataclasses.replace(config, parallel=parallel)
        argv = pretrain.arguments(run_config, tmp_path / board)
        argv += pretrain.hyper_connection_flags(run_config)
        workers.run(pretrain.run_loop, 2, [*argv, *flags])
        return pretrain.scalars(tmp_path / board)

    whole = run("whole", vee)["lm loss"]
    found = []
    for steps, parallel in ((2, vee), (4, ParallelConfig(pipeline=2)), (6, vee)):
        found += run(f"to-{steps}", parallel, *f"{kept} --exit-interval {steps}".split())["lm loss"]
    assert found[:2] == whole[:2]
    # Other stages add up the gradients of a weight in the same order, but not the norm's squares.
    assert found == pytest.approx(whole, rel=_LOSS)
    assert len(set(found)) == config.steps
