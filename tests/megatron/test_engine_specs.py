"""Megatron's layer specs of Transformer Engine, whose modules a CPU process has in plain torch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]

# (schedule, model, ranks). MoE runs here under our schedules on every release of megatron-core, of
# which older ones refuse it without Transformer Engine. The deepest model is the first: Megatron's
# log of auxiliary losses has as many layers as the first.
PIPELINES = [
    ("dualpipe_v", "moe", 4),
    ("zb_h1", "moe", 4),
    ("dualpipe_v", "moe", 2),
    ("zb_h1", "moe", 2),
    ("zb_h1", "mla", 2),
    ("dualpipe_v", "dense", 2),
]

# In a process of its own: megatron-core looks for Transformer Engine when it is imported.
SCRIPT = f"""
import dataclasses, json, os, sys
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent / "benchmarks")!r}]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
from helpers import fake_engine
fake_engine.install()
import torch
from helpers import engine
from virtual_ranks import VirtualRanks, run_config
from mhc_megatron.config import MHCConfig
torch.set_num_threads(1)
engine.LENGTH, found = 16, {{}}
few = MHCConfig(sinkhorn_iterations=3)
with engine.single_process():
    for schedule, model, ranks in {PIPELINES}:
        config = run_config(
            schedule, ranks, hidden_size=32, seq_length=8, transformer_impl="transformer_engine"
        )
        config = engine.with_model(config, **engine.MODELS[model])
        config = dataclasses.replace(config, mhc=few)
        steps = []
        for delay in (False, True):
            virtual = VirtualRanks(config, torch.device("cpu"), delay=delay)
            virtual.draw(0)
            steps.append(virtual.pipelined() if delay else virtual.serial())
        found[f"{{schedule}}_{{model}}_{{ranks}}"] = steps[1].differences(steps[0])
    for model in engine.MODELS:
        chunk = engine.build(engine.run_config(model, mhc=few))
        kept = engine.step(chunk)
        vanished = [name for name, g in kept.gradients.items() if not g.abs().sum() > 0]
        differences = {{}}
        for name, mhc in engine.POLICIES.items():
            engine.begin_anew(chunk, mhc)
            differences[name] = engine.step(chunk).differences(kept)
        engine.losses(chunk, 0)
        block = engine.layers(chunk)[0].chain.recompute.current._block
        found[model] = {{
            "kinds": sorted({{type(m).__name__ for m in chunk.modules()}}),
            "vanished": vanished,
            "differences": differences,
            "dropped": [len(block._inputs), len(block._normed)],
        }}
    plain = engine.megatron_config
    def again(config):
        made = plain(config)
        made.recompute_granularity, made.recompute_modules = "selective", ["core_attn", "moe_act"]
        return made
    engine.megatron_config = again
    kept, chunk = None, engine.build(engine.run_config("moe", mhc=few))
    runs = sum(getattr(module, "activation_recompute", False) for module in chunk.modules())
    found["again"] = {{"runs": runs}}
    for name, mhc in {{"none": MHCConfig(), **engine.POLICIES}}.items():
        engine.begin_anew(chunk, mhc)
        step = engine.step(chunk)
        kept = kept or step
        found["again"][name] = step.differences(kept)
    engine.megatron_config = plain
    chunk = engine.build(engine.run_config("moe", mhc=few))
    found["again"]["without"] = engine.step(chunk).differences(kept)
print("found", json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    return json.loads(line.removeprefix("found "))


# Modules that are there, and of six sublayers how many have a norm of their own to drop.
SPECS = {
    "dense": ({"TELayerNormColumnParallelLinear", "TERowParallelLinear"}, 0),
    "moe": ({"TELayerNormColumnParallelLinear", "TERowParallelGroupedLinear", "RMSNorm"}, 3),
    "mla": ({"TELinear", "TELayerNormColumnParallelLinear", "RMSNorm"}, 3),
}


@pytest.mark.parametrize("model", SPECS)
def test_every_gradient_and_the_bits_of_every_policy(model: str, found: dict[str, Any]) -> None:
    kinds, norms = SPECS[model]
    assert kinds < set(found[model]["kinds"])
    assert found[model]["vanished"] == []
    assert not any(found[model]["differences"].values()), found[model]["differences"]
    assert found[model]["dropped"] == [6, norms]


def test_beside_megatrons_recompute_of_attention_and_experts(found: dict[str, Any]) -> None:
    """The bits of every policy are those without either."""
    again = found["again"]
    assert again.pop("runs") == 3  # a layer each
    assert len(again) == 6 and not any(again.values()), again


@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda each: "_".join(map(str, each)))
def test_delayed_weight_gradients_have_the_bits_of_a_loop(
    pipeline: tuple[str, str, int], found: dict[str, Any]
) -> None:
    assert found["_".join(map(str, pipeline))] == []
