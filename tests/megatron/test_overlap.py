"""Interleaved forwards and backwards have the bits of one after the other, in every mode.

Compared with the same layout without overlap: dispatchers exchange the same tokens, so that no sum
has another order, with expert parallelism neither.
"""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import layouts
from helpers.oracle import DENSE, EXACT, FLEX, FLEX_LAYOUT, MOE, check, run_config
from helpers.pool import WorkerPool
from megatron.core import __version__ as core_version
from packaging.version import Version

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.megatron.chunk_phases import reject_unsupported_overlap
from mhc_megatron.megatron.schedule import check_overlap
from mhc_megatron.pipeline.catalogue import generate
from mhc_megatron.pretrain.scheduled import run_schedule
from mhc_megatron.training.layout import ParallelConfig

NUM_MB = 6  # more than fill the pipeline: its middle is pairs alone
V = {"pipeline": 2, "schedule": "dualpipe_v"}
BLOCKS = MHCConfig(recompute="block", recompute_block=2, sinkhorn_iterations=3)
PLAIN = MHCConfig(sinkhorn_iterations=3)
ALONE = {"schedule": "dualpipe_v"}  # two stages on a rank without neighbours
SEQUENCE = {"tensor": 2, "sequence": True}
EXPERTS = {**V, "data": 2, "expert": 2}
PADDED = {**MOE, "moe_expert_capacity_factor": 0.75}
# Through a stand-in for DeepEP. It shows that nothing is lost between the phases of Megatron's own
# dispatcher; nothing of DeepEP's kernels, nor of its stream beside the lanes.
FLEX_ALONE = {**ALONE, **FLEX_LAYOUT}
# name: (model, layout, hyper-connections, mode)
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], MHCConfig, str]] = {
    "dense_all": (DENSE, V, BLOCKS, "all"),
    **{
        f"{name}_{mode}": (DENSE, {**V, **layout}, BLOCKS, mode)
        for name, layout in (("tp2_sp", SEQUENCE), ("tp2", {"tensor": 2}))
        for mode in ("post", "recompute", "all")
    },
    "tp2_sp_post_alone": (DENSE, {**ALONE, **SEQUENCE}, PLAIN, "post"),
    "dense_all_alone": (DENSE, ALONE, BLOCKS, "all"),
    "dense_recompute_dualpipe": (DENSE, {**V, "schedule": "dualpipe"}, BLOCKS, "recompute"),
}
if Version(core_version) >= Version("0.17"):  # test_layouts.py: older ones refuse it without TE
    RUNS |= {
        "experts_all_alone": (MOE, {**ALONE, "data": 2, "expert": 2}, BLOCKS, "all"),
        "experts_tp2_sp_all": (MOE, {**V, **SEQUENCE}, BLOCKS, "all"),
        "experts_post": (MOE, EXPERTS, PLAIN, "post"),
        "experts_recompute": (MOE, EXPERTS, BLOCKS, "recompute"),
        "experts_all": (MOE, EXPERTS, BLOCKS, "all"),
        "padded_experts_all": (PADDED, EXPERTS, BLOCKS, "all"),
        "experts_all_dualpipe": (MOE, {**EXPERTS, "schedule": "dualpipe"}, BLOCKS, "all"),
        "flex_post": (FLEX, FLEX_ALONE, PLAIN, "post"),
        "flex_recompute": (FLEX, FLEX_ALONE, BLOCKS, "recompute"),
        "flex_all": (FLEX, FLEX_ALONE, BLOCKS, "all"),
    }


@pytest.fixture(scope="module")
def serial() -> dict[Any, tuple[Path, Path, list[float]]]:
    return {}


@pytest.mark.parametrize("name", RUNS)
def test_the_same_bits(
    name: str,
    request: pytest.FixtureRequest,
    serial: dict[Any, tuple[Path, Path, list[float]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    model, layout, mhc, mode = RUNS[name]
    flex = model is FLEX
    workers: WorkerPool = request.getfixturevalue("deep_ep_workers" if flex else "workers")
    folder = tmp_path_factory.mktemp(name)
    options: dict[str, Any] = {"mhc": mhc, "global_batch_size": NUM_MB * layout.get("data", 1)}
    options["dtype"] = "bf16" if flex else "fp32"
    options["num_layers"] = 4 * layout.get("pipeline", 1)  # two a stage or more
    key = (*model.items(), mhc.recompute, *layout.items())
    if key not in serial:
        initial, gradients = folder / "initial", folder / "serial"
        initial.mkdir()
        gradients.mkdir()
        alone = run_config(MOE if flex else model, {"distributed_optimizer": flex}, **options)
        workers.run(layouts.save_initial, 1, alone, str(initial))
        config = run_config(model, layout, **options)
        arguments = (config, str(initial), str(gradients))
        losses = workers.run(layouts.losses_and_gradients, config.parallel.world_size, *arguments)
        serial[key] = initial, gradients, losses
    initial, gradients, losses = serial[key]
    own = folder / "own"
    own.mkdir()
    config = run_config(model, {**layout, "overlap": mode}, **options)
    arguments = (config, str(initial), str(own))
    found = workers.run(layouts.losses_and_gradients, config.parallel.world_size, *arguments)
    assert found == losses
    [errors] = workers.run(layouts.differences, 1, str(own), str(gradients))
    check([], errors, EXACT, loss_tolerance=0.0)


SUPPORTED: dict[str, Any] = {
    "num_moe_experts": 4,
    "recompute_granularity": None,
    "recompute_modules": [],
    "fp8": None,
    "moe_token_dispatcher_type": "alltoall",
    "moe_shared_expert_overlap": False,
    "cuda_graph_impl": "none",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recompute_granularity": "full"}, "recompute_granularity='full': a checkpointed layer"),
        ({"fp8": "hybrid"}, "fp8: no test shows"),
        (
            {"moe_token_dispatcher_type": "allgather"},
            "moe_token_dispatcher_type='allgather': it gathers all tokens.* use 'alltoall', or",
        ),
        *(
            (
                {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": backend},
                f"moe_flex_dispatcher_backend='{backend}': .* only DeepEP's.* use 'deepep', or",
            )
            for backend in ("hybridep", "ncclep")
        ),
        ({"moe_shared_expert_overlap": True}, "moe_shared_expert_overlap=True: it has a stream"),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
            "recompute_modules with 'moe'",
        ),
        ({"cuda_graph_impl": "local"}, "cuda_graph_impl='local': a captured layer"),
    ],
)
def test_what_cannot_be_interleaved_is_named(change: dict[str, Any], message: str) -> None:
    def chain(config: dict[str, Any]) -> Any:
        layer = SimpleNamespace(config=SimpleNamespace(**config))
        return SimpleNamespace(layers=[layer], recompute=None)

    supported = chain(SUPPORTED)
    deep_ep = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}
    for accepted in (supported, chain(SUPPORTED | deep_ep)):
        assert reject_unsupported_overlap(accepted, "post") is accepted
    with pytest.raises(UserError, match=message):
        reject_unsupported_overlap(chain(SUPPORTED | change), "post")
    with pytest.raises(UserError, match="has no rebuild to run ahead"):
        reject_unsupported_overlap(supported, "all")
    with pytest.raises(UserError, match="the plain residual's have none"):
        reject_unsupported_overlap(None, "post")


def test_the_process_and_the_schedule_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="zb_h1 has no Overlap to interleave"):
        check_overlap(generate("zb_h1", num_ranks=2, num_mb=4), "post")
    schedule = generate("dualpipe_v", num_ranks=2, num_mb=4)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    check_overlap(schedule, "post")  # of no meaning without a GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        UserError, match=r"CUDA_DEVICE_MAX_CONNECTIONS=1: the lanes .* to 8 or more"
    ):
        check_overlap(schedule, "post")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    check_overlap(schedule, "post")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    check_overlap(schedule, "post")


@pytest.mark.one_core
@pytest.mark.parametrize(
    ("layout", "capability", "refused"),
    [
        ({"tensor": 2, "overlap": "post"}, (9, 0), True),
        ({"context": 2, "overlap": "post"}, (9, 0), True),
        ({"tensor": 2, "overlap": "post"}, (10, 0), False),
        ({"tensor": 2}, (9, 0), False),
        ({"overlap": "post"}, (9, 0), False),
    ],
)
def test_megatrons_loop_wants_one_queue_and_the_lanes_several(
    layout: dict[str, Any],
    capability: tuple[int, int],
    refused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    config = ParallelConfig(**V, **layout)
    args = SimpleNamespace(
        global_batch_size=8,
        micro_batch_size=1,
        data_parallel_size=1,
        distributed_timeout_minutes=1,
    )
    model = SimpleNamespace(transformer=SimpleNamespace(transformer_impl="local"))
    if not refused:
        assert run_schedule(args, model, PLAIN, config).schedule.num_stages == 4
        return
    message = (
        f"--mhc-overlap=post with --tensor-model-parallel-size={config.tensor} and "
        f"--context-parallel-size={config.context}: on this GPU (compute capability 9.0, below 10) "
        "Megatron's loop takes these only with CUDA_DEVICE_MAX_CONNECTIONS=1, and an overlap needs "
        "8 or more; use mhc-megatron train, or --mhc-overlap=none"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run_schedule(args, model, PLAIN, config)
