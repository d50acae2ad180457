"""The doctor's judgement of made-up machines, and one look at the real one."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mhc_megatron.errors import UserError
from mhc_megatron.launch import cli, doctor
from mhc_megatron.launch.checks import Check, collect, supported
from mhc_megatron.launch.gpus import Gpu, Gpus
from mhc_megatron.launch.machine import Core, Machine, Torch, read_machine
from mhc_megatron.launch.needs import recipe_checks
from mhc_megatron.megatron import compat
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.overrides import apply_overrides

VERSIONS = {
    "numpy": "2.4.6",
    "packaging": "26.0",
    "psutil": "7.0.0",
    "matplotlib": "3.11.2",
    "tensorboard": "2.21.0",
    "tqdm": "4.70.1",
    "triton": "3.9.0",
    "nvidia-ml-py": "13.0",
}
LAPTOP = Machine(
    python=(3, 11, 7),
    versions=VERSIONS,
    torch=Torch(version="2.13.0+cpu"),
    core=Core(version="0.16.1"),
    gpus=Gpus(problem="no NVIDIA driver answers (NVML Shared Library Not Found)"),
    cores=2,
    disk_free=50 * 2**30,
)
_H100 = Gpu(
    name="NVIDIA H100",
    memory_bytes=80 * 2**30,
    links_up=18,
    links=18,
    ecc_errors=0,
    clock_mhz=1980,
    max_clock_mhz=1980,
)
NODE = Machine(
    python=(3, 12, 3),
    versions={**VERSIONS, "transformer-engine": "2.9.0", "apex": "0.1"},
    torch=Torch(
        version="2.13.0", cuda="13.0", capabilities=((9, 0), (9, 0)), nccl="2.28.9", gloo=True
    ),
    core=Core(version="0.19.2"),
    extension=("built for torch 2.13.0", ""),
    gpus=Gpus(driver="580.1", devices=(_H100, _H100)),
    slurm="24.05.1",
    cores=32,
    disk_free=50 * 2**30,
)


def with_(machine: Machine, **changes: Any) -> Machine:
    return dataclasses.replace(machine, **changes)


def by_name(checks: list[Check]) -> Mapping[str, Check]:
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


def test_a_complete_machine_is_all_ok() -> None:
    checks = collect(NODE)
    assert {check.status for check in checks} == {"ok"}
    assert {check.note for check in checks} == {""}


def test_every_missing_row_says_what_it_costs() -> None:
    bare = Machine(python=(3, 11, 7), gpus=Gpus(problem="nvidia-ml-py is not installed"))
    rows = by_name(collect(bare))
    missing = {name for name, check in rows.items() if check.status == "missing"}
    assert missing == {*supported(), "apex", "GPUs", "SLURM"}
    for name in supported():
        assert 'pip install "' in rows[name].note
    for name in missing:
        assert rows[name].note and "://" not in rows[name].note
    assert rows["torch"].note == 'nothing runs; pip install "torch>=2.7"'
    assert rows["transformer-engine"].note.endswith(
        'pip install "transformer-engine[pytorch]>=2.8"'
    )


@pytest.mark.parametrize(
    ("version", "status", "note"),
    [
        ("0.15.3", "warn", "older than the supported"),
        ("0.16.0", "ok", ""),
        ("0.16.1", "ok", ""),
        ("0.19.2", "ok", ""),
        ("0.17.0rc0", "ok", ""),
        ("0.20.0", "warn", "newer than the supported"),
    ],
)
def test_megatron_core_against_the_supported_range(version: str, status: str, note: str) -> None:
    row = by_name(collect(with_(NODE, core=Core(version=version))))["megatron-core"]
    assert (row.status, row.found) == (status, version)
    assert row.note.startswith(note) and ("pip install" in row.note) == bool(note)


def test_the_supported_range_is_the_one_that_the_trainer_enforces() -> None:
    assert str(supported()["megatron-core"].specifier) == f"<{compat.NEWEST},>={compat.OLDEST}"


@pytest.mark.parametrize(
    ("changes", "name", "status", "found", "note"),
    [
        ({"python": (3, 14, 0)}, "python", "warn", "3.14.0", "outside the supported"),
        ({"torch": None}, "torch", "missing", "not installed", "nothing runs"),
        (
            {"torch": None, "torch_problem": "libcudart.so.13: cannot open"},
            "torch",
            "missing",
            "does not import: libcudart.so.13: cannot open",
            "nothing runs",
        ),
        (
            {"extension": ("is not built", "pip install this")},
            "launch extension",
            "missing",
            "is not built",
            "the kernels are launched by Python, which costs the host more; pip install this",
        ),
        (
            {"versions": {**NODE.versions, "triton": "3.5.1"}},
            "Hopper kernels",
            "warn",
            "triton 3.5.1",
            "pre and post_pre are slower without them; pip install 'triton>=3.6'",
        ),
        ({"torch": Torch(version="2.4.0")}, "torch", "warn", "2.4.0, CPU build", "older than"),
        (
            {"torch": Torch(version="2.13.0+cpu")},
            "GPU driver",
            "warn",
            "580.1",
            "torch is a CPU build",
        ),
        (
            {"torch": Torch(version="2.13.0", cuda="13.0")},
            "GPU driver",
            "warn",
            "580.1",
            "torch, built for CUDA 13.0, cannot use the GPUs",
        ),
        (
            {"core": Core(version="0.19.2", helper=False)},
            "core's data helper",
            "missing",
            "not compiled for this Python",
            "no training data can be read",
        ),
        (
            {"import_problems": {"transformer-engine": "undefined symbol"}},
            "transformer-engine",
            "missing",
            "2.9.0, which does not import: undefined symbol",
            "no transformer_impl",
        ),
        (
            {"import_problems": {"apex": "No module named 'amp_C'"}},
            "apex",
            "missing",
            "0.1, without its CUDA extensions",
            "costs only speed",
        ),
        (
            {"gpus": Gpus(problem="nvidia-ml-py is not installed")},
            "GPUs",
            "warn",
            "2 in torch",
            "nvidia-ml-py is not installed; their state is unknown",
        ),
        ({"gpus": Gpus(driver="580.1")}, "GPUs", "missing", "none, driver 580.1", "runs use"),
        ({"slurm": None}, "SLURM", "missing", "no sbatch and sinfo in PATH", "no cluster jobs"),
        ({"disk_free": 2**30}, "free disk", "warn", "1.0 GiB", "checkpoints may not fit"),
    ],
)
def test_one_fault(changes: dict[str, Any], name: str, status: str, found: str, note: str) -> None:
    rows = by_name(collect(with_(NODE, **changes)))
    assert (rows[name].status, rows[name].found) == (status, found)
    assert rows[name].note.startswith(note)


@pytest.mark.parametrize(
    ("changes", "status", "found", "note"),
    [
        ({}, "ok", "NVIDIA H100, 80 GiB, NVLinks 18/18 up, 0 ECC errors, 1980 of 1980 MHz", ""),
        ({"links_up": 16}, "warn", "NVLinks 16/18 up", "2 NVLinks are down"),
        ({"ecc_errors": 3}, "warn", "3 ECC errors", "uncorrected memory errors"),
        ({"throttling": ("power cap",)}, "ok", "held down by power cap", ""),
        (
            {"throttling": ("power cap", "power brake")},
            "warn",
            "held down by power cap and power brake",
            "slowed down",
        ),
    ],
)
def test_gpus(changes: dict[str, Any], status: str, found: str, note: str) -> None:
    gpus = Gpus(driver="580.1", devices=(_H100, dataclasses.replace(_H100, **changes)))
    row = by_name(collect(with_(NODE, gpus=gpus)))["GPU 1"]
    assert row.status == status and found in row.found and row.note.startswith(note)


def test_links_of_a_single_gpu_lead_nowhere() -> None:
    gpus = Gpus(driver="580.1", devices=(dataclasses.replace(_H100, links_up=0),))
    assert by_name(collect(with_(NODE, gpus=gpus)))["GPU 0"].status == "ok"


def needs(machine: Machine, *overrides: str) -> Mapping[str, Check]:
    return by_name(recipe_checks(apply_overrides(TrainConfig(), overrides), machine))


def missing(machine: Machine, *overrides: str) -> set[str]:
    rows = needs(machine, *overrides)
    assert all(row.note for row in rows.values() if row.status != "ok")
    return {name for name, row in rows.items() if row.status == "missing"}


BF16 = ("dtype=bf16", "parallel.distributed_optimizer=true")
FP16 = ("dtype=fp16", "parallel.distributed_optimizer=true")
TP2 = ("parallel.tensor=2", "parallel.sequence=true")
MOE = ("model.num_moe_experts=4",)
MLA = ("model.multi_latent_attention=true",)
TE = ("transformer_impl=transformer_engine",)
FP8 = (*TE, "fp8=hybrid")
CP2 = ("parallel.context=2",)
_OLD_CORE = {"core": Core(version="0.16.1")}
_NO_TE = {"versions": VERSIONS}
_V100 = {
    "torch": Torch(version="2.13.0", cuda="12.6", capabilities=((7, 0), (9, 0)), nccl="2.27.1")
}


@pytest.mark.parametrize(
    ("machine", "overrides", "expected"),
    [
        (LAPTOP, (), set()),
        (LAPTOP, TP2, set()),
        (LAPTOP, BF16, {"dtype=bf16"}),
        (LAPTOP, FP16, {"dtype=fp16"}),
        (LAPTOP, TE, {"transformer-engine"}),
        (LAPTOP, MOE, {"MoE layers"}),
        (LAPTOP, MLA, {"multi-latent attention"}),
        (with_(LAPTOP, core=Core(version="0.17.0")), (*MOE, *MLA), set()),
        (with_(LAPTOP, core=None), (), {"megatron-core"}),
        (with_(LAPTOP, core=Core(version="0.20.0")), (), {"megatron-core"}),
        (with_(LAPTOP, core=Core(version="0.19.2", helper=False)), (), {"core's data helper"}),
        (with_(LAPTOP, torch=None), (), {"torch"}),
        (with_(LAPTOP, torch=Torch(version="2.13.0", gloo=False)), (), {"gloo"}),
        (with_(LAPTOP, versions={**VERSIONS, "numpy": "0"}), (), set()),
        (with_(LAPTOP, python=(3, 9, 1)), (), {"python"}),
        (NODE, (*BF16, *TP2, *TE, *MOE, *MLA), set()),
        (NODE, (*CP2, *TE), set()),
        (NODE, ("parallel.tensor=4",), {"4 processes (tensor 4)"}),
        (with_(NODE, **_OLD_CORE, **_NO_TE), MOE, {"MoE layers"}),
        (with_(NODE, **_OLD_CORE), (*MOE, *MLA), set()),
        (with_(NODE, **_NO_TE), TE, {"transformer-engine"}),
        (NODE, FP8, set()),
        (NODE, (*FP8, "fp8_recipe=mxfp8"), {"fp8_recipe=mxfp8"}),
        (with_(NODE, **_V100), FP8, {"fp8_recipe=delayed"}),
        (LAPTOP, FP8, {"transformer-engine"}),
        (with_(NODE, import_problems={"transformer-engine": "x"}), TE, {"transformer-engine"}),
        (with_(NODE, **_V100), BF16, {"dtype=bf16"}),
        (with_(NODE, **_V100), FP16, set()),
        (NODE, ("data.tokenizer=hf:gpt2",), {"tokenizer hf:gpt2"}),
        (NODE, ("data.train=nowhere/x", "data.valid=nowhere/y"), {"data.train", "data.valid"}),
    ],
)
def test_what_a_recipe_misses(
    machine: Machine, overrides: tuple[str, ...], expected: set[str]
) -> None:
    assert missing(machine, *overrides) == expected


def test_too_few_gpus_say_how_many_machines_it_takes() -> None:
    row = needs(NODE, "parallel.tensor=4", "parallel.data=2", "global_batch_size=16")[
        "8 processes (tensor 4 x data 2)"
    ]
    assert row.found == "2 GPUs" and "torchrun on 4 such machines" in row.note


def test_more_processes_than_cores_only_warn() -> None:
    row = needs(LAPTOP, "parallel.tensor=4")["4 processes (tensor 4)"]
    assert (row.status, row.found) == ("warn", "2 CPU cores")


def test_data_that_is_there(tmp_path: Path) -> None:
    for name in ("train.bin", "train.idx", "valid.bin"):
        (tmp_path / name).touch()
    overrides = (f"data.train={tmp_path}/train", f"data.valid={tmp_path}/valid")
    assert missing(LAPTOP, *overrides) == {"data.valid"}
    assert needs(LAPTOP, *overrides)["data.valid"].found == f"no {tmp_path}/valid.idx"


@pytest.fixture
def laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "read_machine", lambda: LAPTOP)


def laptop_recipe() -> TrainConfig:
    return TrainConfig()


def test_the_table(laptop: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(
        "ok       python              3.11.7\nok       torch               2.13.0+cpu, CPU build\n"
    )
    assert '\n                             pip install "transformer-engine[pytorch]' in shown
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize(
    ("overrides", "status", "verdict"),
    [([], 0, "can run here"), (["--set", *BF16], 1, "cannot run here")],
)
def test_the_status_tells_whether_a_recipe_can_run(
    laptop: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    status: int,
    verdict: str,
) -> None:
    monkeypatch.setitem(sys.modules, "my_recipes", sys.modules[__name__])
    recipe = "my_recipes:laptop_recipe"
    assert cli.main(["doctor", "--recipe", recipe, *overrides]) == status
    assert capsys.readouterr().out.endswith(f"{recipe} {verdict}\n")


def test_json(laptop: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--recipe", "gpt-100m", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert (record["recipe"], record["runnable"]) == ("gpt-100m", False)
    assert record["machine"][0] == dataclasses.asdict(collect(LAPTOP)[0])
    assert any(row["name"] == "dtype=bf16" for row in record["needs"])
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runnable"] is None


def test_overrides_without_a_recipe_are_refused(laptop: None) -> None:
    with pytest.raises(UserError, match="name it with --recipe"):
        doctor.run(cli.argparse.Namespace(recipe=None, overrides=["steps=1"], json=False))


def test_this_machine() -> None:
    machine = read_machine()
    assert machine.torch is not None and machine.torch.version == torch.__version__
    assert machine.versions["numpy"] and machine.cores >= 1 and machine.disk_free > 0
    assert by_name(collect(machine))["python"].status == "ok"
