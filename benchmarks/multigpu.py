"""Several GPUs of one host: layouts against one GPU, pipeline steps, messages, scaling, a death.

    python benchmarks/multigpu.py --results benchmarks/results/h100
    python benchmarks/multigpu.py --results out --device cpu --ranks 2 --hidden 32 --seq 16

Starts a process per GPU, on 2, 4 or 8 of them. The parts, by name in ``--parts``:

parity   every layout against one GPU, in bf16 (multigpu_parity.py)
steps    step times of a pipeline, plain residual and mHC (multigpu_steps.py)
experts  step times of expert parallelism, plain residual and mHC, and with its exchanges hidden
p2p      bandwidth of messages of n*C between two GPUs (multigpu_p2p.py)
scaling  tokens per second over data-parallel ranks with equal work on each (multigpu_steps.py)
kill     a rank that is killed in a step ends the job, named (multigpu_kill.py)

Every part has a limit of time, and so has each of its jobs: what hangs is ended, and the next goes
on. What no time was left for is named in the end: all of it takes more than one call. Lines are
printed and appended to ``<results>/multigpu.jsonl`` as they are found (format:
benchmarks/README.md). Exit status 1 if anything failed.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from provenance import append, provenance
from ranks import OutOfTime, Ranks, WorkerFailed

from mhc_megatron.errors import UserError

# Seconds, without the start of processes. Together below nine minutes; by itself a part may have
# all of them. Its first job compiles the kernels, a minute.
LIMITS = {
    "parity": 130.0,
    "steps": 120.0,
    "experts": 110.0,
    "p2p": 40.0,
    "scaling": 50.0,
    "kill": 80.0,
}


@dataclass
class Bench:
    """What the parts share: processes, sizes, and the results file."""

    args: argparse.Namespace
    ranks: Ranks
    folder: Path
    source: dict[str, Any]
    failed: int = 0
    left_out: list[str] = field(default_factory=list)

    def attempt(self, name: str, lines: Callable[[], Iterator[dict[str, Any]]]) -> None:
        """Append the lines of one case; a failure is printed and counted."""
        start = time.monotonic()
        try:
            for line in lines():
                self._append(line)
        except UserError as error:
            self.say(f"{name}: not run: {error}")
        except OutOfTime:
            self.left_out.append(name)
        except WorkerFailed as error:
            self.failed += 1
            self.say(f"{name}: FAILED\n{error}")
        except Exception:  # the other cases are worth their time all the same
            self.failed += 1
            self.say(f"{name}: FAILED\n{traceback.format_exc()}")
        self.say(f"{name}: {time.monotonic() - start:.1f} s")

    def _append(self, line: dict[str, Any]) -> None:
        append(self.args.results, {"benchmark": "multigpu", **line}, self.source)
        shown = {k: v for k, v in line.items() if k != "shape"}
        print("  " + json.dumps(shown), flush=True)

    def say(self, text: str) -> None:
        """Progress, with the time since the start."""
        print(f"[{time.monotonic() - START:6.1f}] {text}", flush=True)


START = time.monotonic()


def parity(bench: Bench) -> None:
    """Every layout against one GPU."""
    import multigpu_parity as part
    from parity_cases import Case, cases

    work = part.Parity(bench.ranks, bench.folder, _parity_size(bench.args), bench.args.backend)
    for name, case in cases(bench.ranks.num_ranks).items():
        if bench.args.cases and name not in bench.args.cases:
            continue

        def lines(name: str = name, case: Case = case) -> Iterator[dict[str, Any]]:
            line = work.line(name, case)
            yield line
            if bool(line["mismatches"]) is not case.spoiled:
                bench.failed += 1
                bench.say(f"{name}: {'MISMATCHES' if line['mismatches'] else 'FAULT NOT FOUND'}")

        bench.attempt(name, lines)


def _parity_size(args: argparse.Namespace) -> dict[str, int]:
    hidden = args.hidden or 512
    return {
        "num_layers": args.layers or 8,
        "hidden_size": hidden,
        "num_attention_heads": 8,
        "ffn_hidden_size": 2 * hidden,
        "seq_length": args.seq or 512,
    }


def steps(bench: Bench) -> None:
    """Step times of a pipeline over all ranks."""
    import multigpu_steps as part
    from step_models import SCHEDULES

    for model, name, launch in product(bench.args.models, SCHEDULES, bench.args.launches):
        if bench.args.cases and name not in bench.args.cases:
            continue
        case = (_size(bench, model), name, launch)
        bench.attempt(
            f"steps {model} {name} {launch}",
            lambda case=case: part.step_lines(bench.ranks, *case, num_layers=bench.args.layers),
        )


def experts(bench: Bench) -> None:
    """Step times of expert parallelism over all ranks."""
    import multigpu_steps as part

    for model, launch in product(bench.args.models, bench.args.launches):
        case = (_size(bench, model), launch)
        bench.attempt(
            f"experts {model} {launch}",
            lambda case=case: part.expert_lines(
                bench.ranks, *case, num_layers=bench.args.layers, only=bench.args.cases
            ),
        )


def p2p(bench: Bench) -> None:
    """Messages between two ranks."""
    import multigpu_p2p as part

    bench.attempt(
        "p2p", lambda: part.p2p_lines(bench.ranks, hidden=bench.args.hidden, seq=bench.args.seq)
    )


def scaling(bench: Bench) -> None:
    """Data parallelism over more and more ranks."""
    import multigpu_steps as part

    layers = bench.args.layers or 4
    for model, launch in product(bench.args.models, bench.args.launches):
        case = (_size(bench, model), launch)
        bench.attempt(
            f"scaling {model} {launch}",
            lambda case=case: part.scaling_lines(bench.ranks, *case, num_layers=layers),
        )


def kill(bench: Bench) -> None:
    """A rank that dies."""
    import multigpu_kill as part

    bench.ranks.close()  # their memory and cores are for the processes of this part

    def lines() -> Iterator[dict[str, Any]]:
        for line in part.kill_lines(
            bench.ranks.num_ranks,
            _parity_size(bench.args),
            bench.args.backend,
            bench.folder / "kill",
            patience=bench.args.patience,
        ):
            yield line
            bench.failed += bool(line["problems"])

    bench.attempt("kill", lines)


def case_names(parts: list[str], num_ranks: int) -> list[str]:
    """What ``--cases`` can name of these parts."""
    from parity_cases import cases
    from step_models import NO_PIPELINE, SCHEDULES, variants

    names = {"parity": cases(num_ranks), "steps": SCHEDULES, "experts": variants(NO_PIPELINE)}
    return [name for part in parts for name in names.get(part, ())]


def _size(bench: Bench, model: str) -> Any:
    from step_models import size_of

    args = bench.args
    return size_of(model, hidden=args.hidden, seq=args.seq, backend=args.backend, out=bench.folder)


PARTS: dict[str, Callable[[Bench], None]] = {
    "parity": parity,
    "steps": steps,
    "experts": experts,
    "p2p": p2p,
    "scaling": scaling,
    "kill": kill,
}


def main() -> int:
    """Run the parts; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True, help="results folder")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--cases", nargs="+", help="of parity, steps and experts: only these")
    parser.add_argument(
        "--launches",
        nargs="+",
        choices=("eager", "graph"),
        help="of steps, experts and scaling (default: both on GPUs)",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=("3B", "27B"),
        default=["3B"],
        help="of steps, experts and scaling: whose width (default: %(default)s)",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, help="processes (default: one per GPU)")
    parser.add_argument("--hidden", type=int, metavar="C", help="instead of each part's own")
    parser.add_argument("--seq", type=int, metavar="S", help="instead of each part's own")
    parser.add_argument("--layers", type=int, metavar="L", help="instead of each part's own")
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies all limits")
    parser.add_argument("--commit", help="the code measured (default: git's HEAD)")
    args = parser.parse_args()
    parts = args.parts.split(",")
    unknown = set(parts) - set(PARTS)
    if unknown:
        parser.error(f"--parts={args.parts}: {', '.join(unknown)} is not one of {', '.join(PARTS)}")
    _prepare_environment(args)
    num_ranks = args.ranks or torch.cuda.device_count()
    if num_ranks < 2 or (args.device == "cuda" and torch.cuda.device_count() < num_ranks):
        parser.error(f"{num_ranks} ranks on {torch.cuda.device_count()} GPUs; 2 at least")
    if unknown := set(args.cases or ()) - set(names := case_names(parts, num_ranks)):
        parser.error(f"--cases: {', '.join(sorted(unknown))} is not one of {', '.join(names)}")
    args.results.mkdir(parents=True, exist_ok=True)
    ranks = Ranks(num_ranks, patience=args.patience)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, ranks, Path(folder), provenance(args.commit))
        try:
            for name in parts:
                seconds = limit(parts, name)
                bench.say(f"{name}, at most {seconds * args.patience:.0f} s")
                ranks.begin(seconds)
                PARTS[name](bench)
        finally:
            ranks.close()
    if bench.left_out:
        bench.say(f"no time was left for {', '.join(bench.left_out)}: ask for them with --parts")
    bench.say(f"{bench.failed} failed")
    return int(bench.failed > 0)


def limit(parts: list[str], name: str) -> float:
    """Seconds that a part may take in a call of ``parts``, which share those of all."""
    return sum(LIMITS.values()) * LIMITS[name] / sum(LIMITS[part] for part in parts)


def _prepare_environment(args: argparse.Namespace) -> None:
    """What the processes inherit."""
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    args.backend = "triton" if args.device == "cuda" else "reference"
    args.launches = args.launches or (["eager", "graph"] if args.device == "cuda" else ["eager"])
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # no multicast over NVLink
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # sums in one order, also on busy streams
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # a queue for every stream
    os.environ.setdefault("PYTHONWARNINGS", "ignore")


if __name__ == "__main__":
    sys.exit(main())
