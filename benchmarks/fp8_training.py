"""The same model trained in bf16 and in each FP8 recipe: final losses, repeats, one plot.

    python benchmarks/fp8_training.py --out runs/fp8 --results benchmarks/results/h100

Recipe ``gpt-100m`` with Transformer Engine on the embedded corpus, with hyper-connections and with
the plain residual, from the same seeds; every run of hyper-connections from the first seed a second
time, for its bits. A rounding sends a run another way, as a seed does: more than one seed says how
far. Runs share the GPUs, so their times mean nothing and are not recorded. Appends one line per run
to ``<results>/fp8_training.jsonl`` (format: benchmarks/README.md) and leaves the runs and a
page with all curves in ``--out``.
"""

import argparse
import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from one_gpu import one_gpu
from provenance import append, provenance

from mhc_megatron.report.compare import write_comparison
from mhc_megatron.report.run import Run, load_run, summarise

RECIPE = "gpt-100m"
RESIDUALS = ("mhc", "plain")
DTYPES = ("bf16", "delayed", "tensorwise", "blockwise")
# Kernels whose sums have one order; and what delayed scaling needs to be saved.
ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "OMP_NUM_THREADS": "1",
    "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE": "1",
}
# Steps between the losses of a line's curve.
CURVE = 10


@dataclass(frozen=True)
class Training:
    """One run."""

    residual: str
    dtype: str
    seed: int
    repeat: bool = False

    @property
    def name(self) -> str:
        """Of its folder, and in the plot."""
        name = f"{self.residual}-{self.dtype}-{self.seed}"
        return name + ("-repeat" if self.repeat else "")

    def overrides(self, more: list[str]) -> list[str]:
        """Of the recipe."""
        values = ["transformer_impl=transformer_engine", f"model.residual={self.residual}"]
        values.append(f"seed={self.seed}")
        if self.dtype != "bf16":
            values += ["fp8=hybrid", f"fp8_recipe={self.dtype}"]
        return values + more

    def train(self, out: Path, more: list[str], place: dict[str, str]) -> str | None:
        """Run it in a process of its own; returns what went wrong.

        Args:
            out: folder of the runs.
            more: overrides of the recipe.
            place: of its environment, which GPU it sees.
        """
        command = [sys.executable, "-m", "mhc_megatron.launch.cli", "train", "--recipe", RECIPE]
        command += ["--out", str(out / self.name), "--set", *self.overrides(more)]
        environment = os.environ | ENVIRONMENT | place
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        print(f"{self.name}: exit status {ended.returncode}", flush=True)
        return ended.stderr[-2000:] if ended.returncode else None


def record(training: Training, runs: Mapping[str, Run]) -> dict[str, Any]:
    """The result line of one run, without its provenance.

    Args:
        training: the run.
        runs: by name, it and those before it.
    """
    run = runs[training.name]
    assert run.info is not None
    config, losses = run.info.config, run.curve("loss").values
    value = summarise(training.name, run).train_loss
    line: dict[str, Any] = {
        "benchmark": "fp8_training",
        "impl": "mhc_megatron" if training.residual == "mhc" else "megatron_core",
        "shape": {
            "T": config["micro_batch_size"] * config["model"]["seq_length"],
            "C": config["model"]["hidden_size"],
            "n": config["mhc"]["num_streams"] if training.residual == "mhc" else 1,
            "layers": config["model"]["num_layers"],
            "parameters": run.info.parameters,
            "steps": len(losses),
            "dtype": training.dtype,
            "history": config["fp8_amax_history_len"],
            "peak_lr": config["optimizer"]["lr"],
            "seed": training.seed,
        },
        "metric": "final_loss",
        "value": value,
        "unit": "nats/token",
        "finite": all(map(math.isfinite, losses)),
        "curve": losses[::CURVE],
    }
    bf16 = runs.get(dataclasses.replace(training, dtype="bf16", repeat=False).name)
    if bf16 is not None and value is not None:
        line["ratio_to_bf16"] = value / summarise("bf16", bf16).train_loss
    first = runs.get(dataclasses.replace(training, repeat=False).name)
    if training.repeat and first is not None:
        line["deterministic"] = losses == first.curve("loss").values
    return line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--results", type=Path, required=True, help="results folder")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--residuals", nargs="+", choices=RESIDUALS, default=list(RESIDUALS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1234], metavar="SEED")
    parser.add_argument("--workers", type=int, default=4, help="runs at a time (%(default)s)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the recipe, for all runs"
    )
    parser.add_argument("--commit", help="the code measured (default: git's HEAD)")
    args = parser.parse_args()
    source = provenance(args.commit)
    trainings = [
        Training(residual, dtype, seed)
        for seed in args.seeds
        for residual in args.residuals
        for dtype in args.dtypes
    ]
    if "mhc" in args.residuals:
        trainings += [Training("mhc", dtype, args.seeds[0], repeat=True) for dtype in args.dtypes]
    runs: dict[str, Run] = {}
    failed: list[str] = []
    args.results.mkdir(parents=True, exist_ok=True)
    places: SimpleQueue[dict[str, str]] = SimpleQueue()
    for worker in range(args.workers):
        places.put(one_gpu(worker))

    def train(training: Training) -> str | None:
        place = places.get()
        try:
            return training.train(args.out, args.set, place)
        finally:
            places.put(place)

    with ThreadPoolExecutor(args.workers) as pool:
        # In their order, each as soon as it and those before it have ended.
        for training, text in zip(trainings, pool.map(train, trainings), strict=True):
            if text is not None:
                failed.append(training.name)
                print(f"{training.name} failed:\n{text}", file=sys.stderr, flush=True)
                continue
            runs[training.name] = load_run(args.out / training.name)
            line = record(training, runs)
            append(args.results, line, source)
            found = [f"{training.name}: loss {line['value']:.4f}"]
            found += [f"{k} {line[k]}" for k in ("ratio_to_bf16", "deterministic") if k in line]
            print(", ".join(found), flush=True)
    if runs:
        folders = {name: args.out / name for name in runs if not name.endswith("-repeat")}
        print(f"curves: {write_comparison(folders, args.out / 'comparison.html')}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
