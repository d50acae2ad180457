"""The same model trained in bf16 and in each FP8 recipe: final losses, repeats, one plot.

    python benchmarks/fp8_training.py --out runs/fp8 --results benchmarks/results/h100

Recipe ``gpt-100m`` with Transformer Engine, from one seed on the embedded corpus, with
hyper-connections and with the plain residual; every run of hyper-connections a second time, for its
bits. Runs share the GPU, so their times mean nothing and are not recorded. Appends one line per run
to ``<results>/fp8_training.jsonl`` (format: benchmarks/README.md) and leaves the runs and a
page with all curves in ``--out``.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from provenance import provenance

from mhc_megatron.report.compare import write_comparison
from mhc_megatron.report.run import Run, load_run, summarise
from mhc_megatron.training.recipes import load_recipe

RECIPE = "gpt-100m"
DTYPES = ("bf16", "delayed", "tensorwise", "blockwise")
RESIDUALS = ("mhc", "plain")
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
    repeat: bool = False

    @property
    def name(self) -> str:
        """Of its folder, and in the plot."""
        return f"{self.residual}-{self.dtype}" + ("-repeat" if self.repeat else "")

    def overrides(self, more: list[str]) -> list[str]:
        """Of the recipe."""
        values = ["transformer_impl=transformer_engine", f"model.residual={self.residual}"]
        if self.dtype != "bf16":
            values += ["fp8=hybrid", f"fp8_recipe={self.dtype}"]
        return values + more

    def train(self, out: Path, more: list[str]) -> str | None:
        """Run it in a process of its own; returns what went wrong."""
        command = [sys.executable, "-m", "mhc_megatron.launch.cli", "train", "--recipe", RECIPE]
        command += ["--out", str(out / self.name), "--set", *self.overrides(more)]
        environment = os.environ | ENVIRONMENT
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        print(f"{self.name}: exit status {ended.returncode}", flush=True)
        return ended.stderr[-2000:] if ended.returncode else None


def record(
    run: Run, training: Training, bf16: Run | None, twin: Run | None, shape: dict[str, Any]
) -> dict[str, Any]:
    """The result line of one run, without its provenance.

    Args:
        run, training: the run.
        bf16: the same residual in bf16.
        twin: its repeat.
        shape: of all runs.
    """
    losses = run.curve("loss").values
    value = summarise(training.name, run).train_loss
    line: dict[str, Any] = {
        "benchmark": "fp8_training",
        "impl": "mhc_megatron" if training.residual == "mhc" else "megatron_core",
        "shape": {**shape, "dtype": training.dtype},
        "metric": "final_loss",
        "value": value,
        "unit": "nats/token",
        "finite": all(map(math.isfinite, losses)),
        "curve": losses[::CURVE],
    }
    if bf16 is not None and value is not None:
        line["ratio_to_bf16"] = value / summarise("bf16", bf16).train_loss
    if twin is not None:
        line["deterministic"] = losses == twin.curve("loss").values
    return line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--results", type=Path, required=True, help="results folder")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--workers", type=int, default=4, help="runs at a time (%(default)s)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the recipe, for all runs"
    )
    parser.add_argument("--commit", help="the code measured (default: git's HEAD)")
    args = parser.parse_args()
    source, recipe = provenance(args.commit), load_recipe(RECIPE)
    # Repeats first: with few workers the last runs are then the cheap ones.
    trainings = [
        Training("mhc", dtype, repeat) for dtype in args.dtypes for repeat in (False, True)
    ]
    trainings += [Training("plain", dtype) for dtype in args.dtypes]
    with ThreadPoolExecutor(args.workers) as pool:
        problems = pool.map(lambda training: training.train(args.out, args.set), trainings)
        failed = {t.name: text for t, text in zip(trainings, problems, strict=True) if text}
    for name, text in failed.items():
        print(f"{name} failed:\n{text}", file=sys.stderr)
    runs = {t.name: load_run(args.out / t.name) for t in trainings if t.name not in failed}
    args.results.mkdir(parents=True, exist_ok=True)
    with (args.results / "fp8_training.jsonl").open("a") as file:
        for residual, dtype in itertools.product(RESIDUALS, args.dtypes):
            training = Training(residual, dtype)
            if (run := runs.get(training.name)) is None or run.info is None:
                continue
            model = run.info.config["model"]
            shape = {
                "T": run.info.config["micro_batch_size"] * model["seq_length"],
                "C": model["hidden_size"],
                "n": recipe.mhc.num_streams if residual == "mhc" else 1,
                "layers": model["num_layers"],
                "parameters": run.info.parameters,
                "steps": len(run.curve("loss")),
            }
            twin = runs.get(Training(residual, dtype, repeat=True).name)
            line = record(run, training, runs.get(f"{residual}-bf16"), twin, shape)
            file.write(json.dumps({**line, **source}) + "\n")
            found = [f"{training.name}: loss {line['value']:.4f}"]
            found += [f"{k} {line[k]}" for k in ("ratio_to_bf16", "deterministic") if k in line]
            print(", ".join(found), flush=True)
    if runs:
        folders = {name: args.out / name for name in runs if not name.endswith("-repeat")}
        print(f"curves: {write_comparison(folders, args.out / 'comparison.html')}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
