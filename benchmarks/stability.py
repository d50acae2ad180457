"""Plain residual, HC and mHC trained alike: final losses, gain magnitudes, step times.

    python benchmarks/stability.py --recipe gpt-100m --out runs/gpt --results benchmarks/results

Appends one line per variant and figure to ``<results>/stability.jsonl`` (format:
benchmarks/README.md) and leaves the runs, with their reports and the comparison, in ``--out``.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from provenance import provenance

from mhc_megatron.errors import UserError
from mhc_megatron.report.run import Summary, load_run, summarise
from mhc_megatron.training.cli import add_compare_arguments, compare_configs, run_compare

# attribute of the summary, metric, unit
FIGURES = (
    ("train_loss", "train_loss", "nats/token"),
    ("valid_loss", "valid_loss", "nats/token"),
    ("gain_forward", "max_composite_gain_forward", "1"),
    ("gain_backward", "max_composite_gain_backward", "1"),
    ("log_column", "max_composite_log_column", "1"),
    ("step_ms", "step", "ms"),
    ("tokens_per_s", "throughput", "tokens/s"),
)


def lines(name: str, summary: Summary, config: Any, source: dict[str, Any]) -> list[dict[str, Any]]:
    """The result lines of one variant."""
    model = config.model
    shape = {
        "T": config.micro_batch_size * model.seq_length,
        "C": model.hidden_size,
        "n": config.mhc.num_streams if model.residual == "mhc" else 1,
        "layers": model.num_layers,
        "global_batch": config.global_batch_size,
        "steps": config.steps,
        "dtype": config.dtype,
    }
    return [
        {
            "benchmark": "stability",
            "impl": name,
            "shape": shape,
            "metric": metric,
            "value": getattr(summary, attribute),
            "unit": unit,
            **source,
        }
        for attribute, metric, unit in FIGURES
        if getattr(summary, attribute) is not None
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_compare_arguments(parser)
    parser.add_argument("--results", type=Path, required=True, help="folder of stability.jsonl")
    parser.add_argument("--commit", help="the code measured (default: git's HEAD)")
    args = parser.parse_args()
    try:
        source = provenance(args.commit)
        status = run_compare(args)
        if status != 0:
            return status
        args.results.mkdir(parents=True, exist_ok=True)
        with (args.results / "stability.jsonl").open("a") as file:
            for name, config in compare_configs(args).items():
                summary = summarise(name, load_run(config.out))
                for line in lines(name, summary, config, source):
                    file.write(json.dumps(line) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
