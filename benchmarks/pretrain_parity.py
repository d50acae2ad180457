"""Megatron's own training loop and ours on the same model, seed and data: the same losses?

    python benchmarks/pretrain_parity.py --results benchmarks/results/h100

``mhc-megatron pretrain`` and the trainer, one after the other, each in a process of its own on one
GPU (or CPU), in float32. Needs megatron-core 0.19. Appends one line per figure to
``<results>/pretrain_parity.jsonl`` (format: benchmarks/README.md). Exit status 1 if the losses
differ by more than float32 sums in another order.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from provenance import append, provenance
from ranks import Ranks

from mhc_megatron.config import MHCConfig
from mhc_megatron.training.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from helpers import pretrain, training

SECONDS = 240.0  # of each run; the first compiles the kernels
BOUND = 1e-5


def run_config(folder: Path, steps: int, backend: Any) -> TrainConfig:
    """A model of four layers on a small corpus."""
    train, valid = training.corpus(folder, documents=600)
    return TrainConfig(
        model=ModelConfig(
            num_layers=4,
            hidden_size=256,
            num_attention_heads=4,
            ffn_hidden_size=512,
            seq_length=256,
        ),
        mhc=MHCConfig(contraction="learned", backend=backend),
        optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup_steps=0),
        data=DataConfig(train=train, valid=valid),
        steps=steps,
        micro_batch_size=4,
        global_batch_size=8,
        eval_iters=1,
        out=str(folder / "ours"),
    )


def lines(config: TrainConfig, ranks: Ranks, folder: Path) -> Iterator[dict[str, Any]]:
    """Of losses and gradient norms, without provenance."""
    board = folder / "tensorboard"
    argv = pretrain.arguments(config, board) + pretrain.hyper_connection_flags(config)
    ranks.run(pretrain.run_loop, 1, argv, seconds=SECONDS)
    ranks.close()  # Megatron's loop leaves globals behind
    [(steps, _, _)] = ranks.run(pretrain.train_here, 1, config, seconds=SECONDS)
    theirs = pretrain.scalars(board)
    model = config.model
    for metric, tag, key in (
        ("loss_difference", "lm loss", "loss"),
        ("grad_norm_difference", "grad-norm", "grad_norm"),
    ):
        ours = [step[key] for step in steps]
        yield {
            "benchmark": "pretrain_parity",
            "impl": "megatron.training.pretrain",
            "shape": {
                "T": config.micro_batch_size * model.seq_length,
                "C": model.hidden_size,
                "n": config.mhc.num_streams,
                "layers": model.num_layers,
                "steps": config.steps,
                "dtype": config.dtype,
            },
            "metric": metric,
            "value": max(abs(a / b - 1) for a, b in zip(theirs[tag], ours, strict=True)),
            "unit": "relative",
            "first": [theirs[tag][0], ours[0]],
            "last": [theirs[tag][-1], ours[-1]],
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="results folder")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--commit", help="the code measured (default: git's HEAD)")
    args = parser.parse_args()
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # sums in one order
    source, worst = provenance(args.commit), 0.0
    args.results.mkdir(parents=True, exist_ok=True)
    ranks = Ranks(1)
    backend = "triton" if torch.cuda.is_available() else "reference"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            ranks.begin(2 * SECONDS)
            for line in lines(run_config(folder, args.steps, backend), ranks, folder):
                append(args.results, line, source)
                print(f"{line['metric']}: {line['value']:.1e}, last {line['last']}", flush=True)
                if line["metric"] == "loss_difference":
                    worst = line["value"]
        finally:
            ranks.close()
    if worst > BOUND:
        print(f"losses differ by {worst:.1e}, more than {BOUND:.0e}", file=sys.stderr)
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
