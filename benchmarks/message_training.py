"""What messages in FP8 do to the loss: the same pipeline trained with both message formats.

    python benchmarks/message_training.py --out runs/messages --results benchmarks/results/cpu

Recipe ``stdlib-small-dualpipe-v``, four stages on two processes, from the same seeds on the same
data. Seeds differ by what chance does, formats of one seed by what rounding does.
Appends one line per format to ``<results>/message_training.jsonl`` (format: benchmarks/README.md).
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from provenance import append, provenance

from mhc_megatron.report.run import load_run, summarise
from mhc_megatron.training.recipes import load_recipe

RECIPE = "stdlib-small-dualpipe-v"
FORMATS = ("model", "fp8")


def train(messages: str, seed: int, out: Path, more: list[str]) -> dict[str, float]:
    """Of one run: steps, and training and validation loss at their end, nats per token."""
    folder = out / f"{messages}-{seed}"
    values = [f"parallel.messages={messages}", f"seed={seed}", "save_interval=0", *more]
    command = [sys.executable, "-m", "mhc_megatron.launch.cli", "train", "--recipe", RECIPE]
    command += ["--out", str(folder), "--set", *values]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    found = summarise(messages, load_run(folder))
    assert found.train_loss is not None and found.valid_loss is not None
    return {"steps": found.steps, "train": found.train_loss, "valid": found.valid_loss}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--results", type=Path, required=True, help="results folder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of all runs")
    parser.add_argument("--commit", help="the code measured (default: git's HEAD)")
    args = parser.parse_args()
    source, config = provenance(args.commit), load_recipe(RECIPE)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in FORMATS}
    for seed in range(1, args.seeds + 1):
        for messages in FORMATS:
            found[messages].append(train(messages, seed, args.out, args.set))
            print(f"seed {seed}, {messages}: {found[messages][-1]}", flush=True)
    args.results.mkdir(parents=True, exist_ok=True)
    for messages, losses in found.items():
        ratios = [a["valid"] / b["valid"] for a, b in zip(losses, found["model"], strict=True)]
        line: dict[str, Any] = {
            "benchmark": "message_training",
            "impl": "mhc_megatron",
            "shape": {
                "C": config.model.hidden_size,
                "n": config.mhc.num_streams,
                "layers": config.model.num_layers,
                "stages": config.parallel.num_stages,
                "steps": losses[0]["steps"],
                "messages": messages,
            },
            "metric": "valid_loss",
            "value": statistics.mean(loss["valid"] for loss in losses),
            "unit": "nats/token",
            "by_seed": losses,
            "ratio_to_model": [min(ratios), max(ratios)],
        }
        append(args.results, line, source)
        print(f"{messages}: {line['value']:.4f}, over model {line['ratio_to_model']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
