"""Synthetic runs: folders as a training leaves them, from closed formulas and a fixed seed."""

import dataclasses
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from mhc_megatron.config import MHCConfig
from mhc_megatron.gains import gain_magnitudes
from mhc_megatron.report.metrics import MetricsLog, RunInfo, write_run
from mhc_megatron.training.config import ModelConfig, ParallelConfig, TrainConfig

MakeRun = Callable[..., Path]


def mappings(variant: str, progress: float, *, num_sublayers: int) -> Tensor:
    """[L, 4, 4]: hyper-connections drift from the identity, mHC's stay nearly doubly stochastic."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(num_sublayers, 4, 4, generator=generator, dtype=torch.float64)
    if variant == "hc":
        return torch.eye(4, dtype=torch.float64) + progress * (0.3 * noise + 0.05)
    res = (6 * torch.eye(4, dtype=torch.float64) - 3 + 3 * progress * noise).exp()
    for _ in range(20):
        res = res / res.sum(-2, keepdim=True)
        res = res / res.sum(-1, keepdim=True)
    return res


def make_run(
    folder: Path,
    variant: str = "mhc",
    *,
    steps: int = 12,
    probe_every: int = 4,
    num_layers: int = 2,
    status: Literal["running", "finished", "failed"] = "finished",
) -> Path:
    """Write metrics.jsonl, gains.jsonl and run.json of a run that went as planned."""
    config = TrainConfig(
        model=ModelConfig(residual="plain" if variant == "plain" else "mhc", num_layers=num_layers),
        mhc=MHCConfig(projection="unconstrained" if variant == "hc" else "sinkhorn"),
        parallel=ParallelConfig(tensor=2, sequence=True),
        steps=steps,
        out=f"runs/{variant}",
    )
    environment = {
        "torch": "2.13.0+cpu",
        "megatron_core": "0.16.1",
        "python": "3.11.2",
        "device": "cpu",
        "world_size": 2,
    }
    write_run(
        folder,
        RunInfo(
            config=dataclasses.asdict(config),
            environment=environment,
            status=status,
            parameters=842_752,
        ),
    )
    noise = random.Random(f"{variant} {steps}")
    better = {"plain": 0.0, "hc": 0.03, "mhc": 0.05}[variant]
    names = [f"{layer}.{part}" for layer in range(num_layers) for part in ("attention", "mlp")]
    with MetricsLog(folder) as log:
        for step in range(1, steps + 1):
            progress = step / steps
            loss = 1.6 + 4 * math.exp(-6 * progress) - better * progress
            log.write(
                {
                    "step": step,
                    "loss": loss + noise.gauss(0, 0.05),
                    "lr": 3e-3 * min(1, step / 10) * (0.55 + 0.45 * math.cos(math.pi * progress)),
                    "grad_norm": (0.3 + 2 * math.exp(-9 * progress)) * noise.lognormvariate(0, 0.2),
                    "tokens_per_s": 12_000 * noise.uniform(0.9, 1.05),
                    "step_ms": 170 * {"plain": 1.0, "hc": 1.1, "mhc": 1.2}[variant],
                }
            )
            if step % probe_every == 0:
                log.write({"step": step, "valid_loss": loss + 0.08})
                if variant != "plain":
                    maps = mappings(variant, progress, num_sublayers=2 * num_layers)
                    log.write_gains(step, sublayers=names, gains=gain_magnitudes(maps))
    return folder


@pytest.fixture(name="make_run")
def make_run_fixture() -> MakeRun:
    return make_run
