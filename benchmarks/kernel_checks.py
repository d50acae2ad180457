"""The kernels on many random inputs: largest errors against float64, and bits over many runs.

    python benchmarks/kernel_checks.py --results benchmarks/results/h100
    compute-sanitizer --tool racecheck python benchmarks/kernel_checks.py --results out \\
        --tokens 70 --channels 136 --seeds 1 --repeats 1

Every operation at sizes that no tile divides, on randomised parameters; a multiple of 16 tokens is
what Hopper's own kernel takes. Appends one line per operation, number of streams, dtype and size
to ``<results>/kernel_checks.jsonl`` (format: benchmarks/README.md). Exit status 1 if an error is
beyond its bound or any bit differs.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from contenders import builds_with, check
from implementations import random_operands
from provenance import append, provenance

OPERATIONS = ("post_pre", "single_pass", "pre+post", "norm-inside")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Of the streams' dtype, as is the weight of the norm.
STATES = {"streams", "u", "d_streams", "d_branch", "d_norm_weight"}
# Gradients through a normalised u are of its rounding, which is not that of float64 everywhere: phi
# in two parts instead of float64 is enough to round some numbers to the other side, and where
# streams nearly cancel in u, two of them above all, the norm magnifies it. And they are rounded
# once more, between two kernels. In float32 they have the bounds of the others.
STATE_BOUND = {"post_pre": 3e-3, "single_pass": 3e-3, "pre+post": 3e-3, "norm-inside": 6e-3}
BOUND = {"post_pre": 5e-4, "single_pass": 5e-4, "pre+post": 5e-4, "norm-inside": 1e-3}
# By what bfloat16's gradients of parameters through a norm may be farther off, of two streams.
TWO_STREAMS = 3
FLOAT32_BOUND = 2e-5
# Three numbers, sums in which much cancels.
GATE_BOUND = {"bfloat16": 2e-3, "float32": 2e-4}


def bound(operation: str, n: int, dtype: str, name: str) -> float:
    """The largest relative error that an output or gradient may have."""
    cancels = (operation, n, dtype) == ("norm-inside", 2, "bfloat16")
    if name == "d_alpha":
        return GATE_BOUND[dtype] * (TWO_STREAMS if cancels else 1)
    if (operation, name) == ("pre+post", "d_streams") and dtype == "bfloat16":
        return 2 * STATE_BOUND[operation]  # autograd adds two rounded gradients
    if dtype == "float32":
        return FLOAT32_BOUND
    if name in STATES:
        return STATE_BOUND[operation]
    return BOUND[operation] * (TWO_STREAMS if cancels else 1)


def run(
    operation: str, n: int, dtype: str, tokens: int, args: argparse.Namespace, device: str
) -> tuple[dict[str, Any], list[str]]:
    """The line of one case, without its provenance, and what is wrong."""
    errors: dict[str, float] = {}
    same = True
    for seed in range(args.seeds):
        data = random_operands(tokens, n, args.channels, DTYPES[dtype], seed, device=device)
        repeats = args.repeats if seed == 0 else 1
        found, repeated = check(data, builds_with(None)[operation](data), repeats=repeats)
        same &= repeated
        errors = {name: max(error, errors.get(name, 0.0)) for name, error in found.items()}
    beyond = [
        f"{operation}, n={n}, {dtype}: {name} {error:.1e} is above {limit:.0e}"
        for name, error in errors.items()
        if not error <= (limit := bound(operation, n, dtype, name))
    ]
    if not same:
        beyond.append(f"{operation}, n={n}, {dtype}: bits differ")
    worst = max(errors, key=lambda name: errors[name] / bound(operation, n, dtype, name))
    line = {
        "benchmark": "kernel_checks",
        "impl": f"mhc_megatron.{operation}",
        "shape": {"T": tokens, "C": args.channels, "n": n, "dtype": dtype},
        "metric": "error_over_bound",
        "value": errors[worst] / bound(operation, n, dtype, worst),
        "unit": "1",
        "worst": worst,
        "error": errors,
        "seeds": args.seeds,
        "repeats": args.repeats,
        "deterministic": same,
    }
    return line, beyond


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="results folder")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    parser.add_argument("--streams", type=int, nargs="+", default=[2, 4, 8], metavar="n")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[3001, 3008], metavar="T")
    parser.add_argument("--channels", type=int, default=1288, metavar="C")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=100, help="runs of the first seed")
    parser.add_argument("--commit", help="the code measured (default: git's HEAD)")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source, wrong = provenance(args.commit), []
    args.results.mkdir(parents=True, exist_ok=True)
    for case in itertools.product(args.operations, args.streams, args.dtypes, args.tokens):
        line, beyond = run(*case, args, device)
        wrong += beyond
        append(args.results, line, source)
        print(
            f"{line['impl']:<26} n={case[1]} {case[2]:<9} T={case[3]} {line['worst']:<14}"
            f"{line['value']:>8.3f} of its bound{'' if line['deterministic'] else ', bits differ'}",
            flush=True,
        )
    print("\n".join(wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
