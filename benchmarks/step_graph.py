"""Training steps on one GPU, launched kernel by kernel and as one CUDA graph (``cuda_graph``).

    python benchmarks/step_graph.py --results benchmarks/results/h100
    python benchmarks/step_graph.py --results out --device cpu --hidden 32 --seq 16 --layers 2

The package's trainer on the model of ``step_models.py``, optimizer included: the plain residual,
hyper-connections, these with their states recomputed, and so in two stages on the one rank, whose
forwards and backwards are paired, and overlap. Appends to ``<results>/step_graph.jsonl`` (format:
benchmarks/README.md).
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch
from multigpu_steps import step_lines
from provenance import append, provenance
from ranks import Ranks
from step_models import LAUNCHES, MODELS, NO_PIPELINE, size_of

from mhc_megatron.config import Backend

SECONDS = 150.0  # of a launch, all variants


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="results folder")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=MODELS, default="3B", help="whose width")
    parser.add_argument("--hidden", type=int, metavar="C", help="instead of the model's")
    parser.add_argument("--seq", type=int, metavar="S", help="instead of the model's")
    parser.add_argument("--layers", type=int, metavar="L")
    parser.add_argument("--commit", help="the code measured (default: git's HEAD)")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu tries the benchmark without")
    source, ranks = provenance(args.commit), Ranks(1)
    args.results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        backend: Backend = "triton" if args.device == "cuda" else "reference"
        size = size_of(
            args.model, hidden=args.hidden, seq=args.seq, backend=backend, out=Path(folder)
        )
        try:
            for launch in LAUNCHES if args.device == "cuda" else ["eager"]:
                ranks.begin(SECONDS)
                for line in step_lines(ranks, size, NO_PIPELINE, launch, num_layers=args.layers):
                    append(args.results, {"benchmark": "step_graph", **line}, source)
                    if line["metric"] == "step":
                        more = line.get("ratio_to_baseline")
                        print(
                            f"{launch:<6} {line['impl']:<28} {line['value']:8.1f} ms"
                            + (f"  {100 * (more - 1):+.1f} %" if more else ""),
                            flush=True,
                        )
        finally:
            ranks.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
