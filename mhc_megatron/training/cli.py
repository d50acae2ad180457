"""``mhc-megatron train`` and ``mhc-megatron compare``."""

import argparse
import dataclasses
import json
import signal
import sys
import tempfile
import time
from pathlib import Path

from mhc_megatron.config import MHCConfig, Projection
from mhc_megatron.errors import UserError
from mhc_megatron.launch.environment import world_from_environment
from mhc_megatron.launch.local import launch_local
from mhc_megatron.report.compare import format_table, summaries, write_comparison
from mhc_megatron.report.heartbeat import read_beats, summary
from mhc_megatron.training import worker
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.overrides import apply_overrides, to_dict
from mhc_megatron.training.recipes import RECIPES, load_recipe

# Signals that nobody sends to end a run.
_KILLED = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
VARIANTS = ("plain", "hc", "mhc")


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``train`` and ``compare`` share."""
    parser.add_argument(
        "--recipe",
        default="stdlib-small",
        help=f"a recipe ({', '.join(RECIPES)}) or package.module:function (default: %(default)s)",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="override fields, for example --set parallel.tensor=1 mhc.num_streams=2 steps=500",
    )
    parser.add_argument("--out", help="run directory (overrides the recipe's)")


def run_train(args: argparse.Namespace) -> int:
    """Train one run: in this process, in a launcher's, or in as many as the layout needs."""
    config = _config(args)
    world = world_from_environment()
    if world is None:
        return train_locally(config)
    return worker.run(config, world)


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """``compare``'s arguments: ``train``'s and the variants."""
    add_train_arguments(parser)
    parser.set_defaults(recipe="stdlib-deep")
    parser.add_argument(
        "--variants",
        default=",".join(VARIANTS),
        help="comma-separated: plain (Megatron's residual), hc (unconstrained hyper-connections), "
        "mhc, or any projection: sinkhorn_v4, permutation, identity (default: %(default)s)",
    )


def run_compare(args: argparse.Namespace) -> int:
    """Train every variant from the same seed on the same data, then write one comparison."""
    configs = compare_configs(args)
    for index, (name, config) in enumerate(configs.items(), start=1):
        print(f"[{index}/{len(configs)}] {name} -> {config.out}", flush=True)
        status = train_locally(config)
        if status != 0:
            return status
    folders = {name: Path(config.out) for name, config in configs.items()}
    page = write_comparison(folders, Path(_config(args).out) / "comparison.html")
    print(format_table(summaries(folders)))
    print(f"comparison: {page}")
    return 0


def compare_configs(args: argparse.Namespace) -> dict[str, TrainConfig]:
    """The runs of a comparison by variant, each in its own folder below the recipe's.

    Raises:
        UserError: fewer than two variants, one twice, or an unknown one.
    """
    base = _config(args)
    names = [name.strip() for name in args.variants.split(",") if name.strip()]
    if len(names) < 2 or len(set(names)) != len(names):
        raise UserError(f"--variants={args.variants!r} must name at least two different variants")
    return {name: _variant(base, name) for name in names}


def train_locally(config: TrainConfig) -> int:
    """Train with one process per rank of the layout, on this machine.

    After a rank was killed, which cannot say where, its last sign of life does.
    """
    with tempfile.TemporaryDirectory(prefix="mhc-megatron-") as folder:
        file = Path(folder) / "train_config.json"
        file.write_text(json.dumps(to_dict(config)))
        status = launch_local(
            "mhc_megatron.training.worker",
            [str(file)],
            num_processes=config.parallel.world_size,
        )
    if status - 128 in _KILLED:
        beats = read_beats(Path(config.out))
        if beats:
            print(summary(beats, now=time.time()), file=sys.stderr)
    return status


def _config(args: argparse.Namespace) -> TrainConfig:
    overrides = list(args.overrides)
    if args.out:
        overrides.append(f"out={args.out}")
    return apply_overrides(load_recipe(args.recipe), overrides)


def _variant(base: TrainConfig, name: str) -> TrainConfig:
    out = str(Path(base.out) / name)
    projections: dict[str, Projection] = {
        "hc": "unconstrained",
        "mhc": "sinkhorn",
        "sinkhorn_v4": "sinkhorn_v4",
        "permutation": "permutation",
        "identity": "identity",
    }
    if name == "plain":
        model = dataclasses.replace(base.model, residual="plain")
        return dataclasses.replace(base, model=model, out=out)
    if name not in projections:
        raise UserError(f"unknown variant {name!r}; use plain, {', '.join(projections)}")
    mhc: MHCConfig = dataclasses.replace(base.mhc, projection=projections[name])
    model = dataclasses.replace(base.model, residual="mhc")
    return dataclasses.replace(base, model=model, mhc=mhc, out=out)
