"""What ``mhc-megatron simulate`` simulates: schedule and costs, from arguments and files.

Every error names the argument, or the file and the place in it.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mhc_megatron.errors import UserError

if TYPE_CHECKING:
    from mhc_megatron.pipeline.costs import Costs
    from mhc_megatron.pipeline.forecast import Forecast
    from mhc_megatron.pipeline.memory import StageSize
    from mhc_megatron.pipeline.schedule import Schedule

# What takes about a minute and 3 GiB on an ordinary core: the first is memory, the others are time.
_MAX_ACTIONS, _MAX_RANKS, _MAX_ROW = 12_000_000, 10_000, 1_000_000


def schedule_of(args: argparse.Namespace) -> "Schedule":
    """The schedule that is asked for, valid, before R is placed.

    Raises:
        UserError: the arguments have to change.
        ScheduleError: the schedule does not admit the numbers, or the file is wrong.
        Deadlock: the file's schedule does not end.
    """
    from mhc_megatron.pipeline.catalogue import CATALOGUE, generate, num_actions
    from mhc_megatron.pipeline.validate import validate

    numbers = {"--ranks": args.ranks, "--micro-batches": args.micro_batches}
    if args.csv is not None:
        others = {"--schedule": args.schedule, **numbers, "--chunks": args.chunks}
        for name, value in others.items():
            if value is not None:
                raise UserError(
                    f"{name} {value} is for a generated schedule; leave it or --csv out"
                )
        return _imported(args.csv)
    if args.schedule is None:
        raise UserError(
            "nothing to simulate; give --csv FILE, or --schedule with one of "
            f"{', '.join(CATALOGUE)}"
        )
    for name, value in numbers.items():
        if value is None:
            raise UserError(f"--schedule {args.schedule} needs {name}")
    counts = {
        "num_ranks": args.ranks,
        "num_mb": args.micro_batches,
        "num_chunks": args.chunks,
    }
    if min(args.ranks, args.micro_batches) > 0:
        _check_size(
            f"--ranks {args.ranks} --micro-batches {args.micro_batches}",
            args.ranks,
            num_actions(args.schedule, **counts),
        )
    schedule = generate(args.schedule, **counts)
    validate(schedule)
    return schedule


def _check_size(what: str, num_ranks: int, num_actions: int) -> None:
    """Refuse before anything is made what would take long, or more memory than there is."""
    each = num_actions // num_ranks
    for number, name, most, fewer in (
        (num_actions, "actions", _MAX_ACTIONS, "ranks or micro-batches"),
        (num_ranks, "ranks", _MAX_RANKS, "ranks"),
        (each, "actions on each rank", _MAX_ROW, "micro-batches"),
    ):
        if number > most:
            raise UserError(
                f"{what}: {number:,} {name} are above the {most:,} that are simulated in about a "
                f"minute and 3 GiB; take fewer {fewer}"
            )


def _imported(file: str) -> "Schedule":
    from mhc_megatron.pipeline.errors import InvalidSchedule, ScheduleError
    from mhc_megatron.pipeline.text import cells_of, from_csv
    from mhc_megatron.pipeline.validate import validate

    text = _read(file)
    num_lines = text.rstrip("\n").count("\n") + 1
    _check_size(file, num_lines, text.count(",") + num_lines)
    with _in_file(file):
        schedule = from_csv(text, name=file)
    try:
        validate(schedule)
    except InvalidSchedule as error:
        cells = [str(cell) for cell in cells_of(text, error.rank, error.compute)]
        place = f", cell{'s' if len(cells) > 1 else ''} {' and '.join(cells)}" if cells else ""
        raise ScheduleError(
            f"{file}: line {error.rank + 1}{place} (rank {error.rank}): {error.compute} "
            f"{error.problem}"
        ) from None
    return dataclasses.replace(schedule, name=Path(file).stem)


def pair_of(args: argparse.Namespace, schedule: "Schedule") -> "Forecast | None":
    """What an Overlap comes to; None without ``--overlap``.

    Raises:
        UserError: the arguments have to change.
        ScheduleError: the file of phase costs, or the recompute block.
    """
    from mhc_megatron.pipeline.actions import Overlap
    from mhc_megatron.pipeline.blocks import best_block, check_block, recompute_plan
    from mhc_megatron.pipeline.forecast import forecast, phase_costs_from_json
    from mhc_megatron.pipeline.phases import stage_phases

    if args.overlap is None:
        if args.phase_costs is not None or args.experts or args.tensor_parallel is not None:
            raise UserError(
                "--phase-costs, --experts and --tensor-parallel describe --overlap; give it, or "
                "leave them out"
            )
        return None
    if not any(isinstance(action, Overlap) for row in schedule.ranks for action in row):
        raise UserError(
            f"--overlap {args.overlap}: {schedule.name} pairs no forward with a backward; "
            "use dualpipe_v or dualpipe"
        )
    layers = _layers_per_stage(args, schedule)
    block = args.recompute_block
    if args.overlap == "post":
        block = 0
    elif block is None:
        block = best_block(num_sublayers=2 * layers, num_streams=args.streams or 4)
    elif block < 1:
        raise UserError(
            f"--overlap {args.overlap} with --recompute-block {block} has nothing to rebuild; "
            "use --overlap post"
        )
    check_block(block, num_sublayers=2 * layers)
    plan = recompute_plan(num_sublayers=2 * layers, block=block)
    phases = stage_phases(
        [args.experts] * layers,
        args.overlap,
        block_ends={rebuilt.stop - 1 for rebuilt in plan},
        loss=False,
        collectives=args.tensor_parallel,
    )
    rebuild = args.overlap != "post"
    if args.phase_costs is None:
        return forecast(phases, rebuild=rebuild)
    with _in_file(args.phase_costs):
        costs, slowdowns = phase_costs_from_json(_read(args.phase_costs))
        return forecast(phases, costs, slowdowns=slowdowns, rebuild=rebuild)


def costs_of(args: argparse.Namespace, schedule: "Schedule", pair: "Forecast | None") -> "Costs":
    """What the sizes and phases say, changed by the cost file.

    Raises:
        UserError: the arguments have to change.
        ScheduleError: the cost file has to, or a size.
    """
    from mhc_megatron.pipeline.costs import Costs, StageCosts, costs_from_json

    stage = StageCosts() if pair is None else pair.stage_costs()
    costs = Costs(default=stage)
    size = _size(args, schedule)
    if size is not None:
        costs = Costs(default=size.costs(stage), message_bytes=size.message_bytes)
    if args.costs is None:
        return costs
    with _in_file(args.costs):
        costs = costs_from_json(_read(args.costs), costs)
        costs.of_stages(schedule.num_stages)
    return costs


def _size(args: argparse.Namespace, schedule: "Schedule") -> "StageSize | None":
    from mhc_megatron.pipeline.memory import StageSize

    given = {
        "streams": args.streams,
        "micro_batch_size": args.micro_batch_size,
        "num_layers": args.layers,
        "recompute_block": args.recompute_block,
        "fp8_messages": None if args.messages is None else args.messages == "fp8",
    }
    given = {name: value for name, value in given.items() if value is not None}
    if args.hidden is None or args.seq is None:
        if args.overlap is not None and args.hidden is None and args.seq is None:
            return None  # layers and blocks are those of its phases
        if given or args.hidden is not None or args.seq is not None:
            raise UserError("bytes need both --hidden and --seq; give them, or none of the sizes")
        return None
    given["num_layers"] = _layers_per_stage(args, schedule)
    return StageSize(hidden=args.hidden, seq=args.seq, **given)


def _layers_per_stage(args: argparse.Namespace, schedule: "Schedule") -> int:
    if args.layers is None:
        return 1
    if args.layers < 1 or args.layers % schedule.num_stages:
        raise UserError(
            f"--layers {args.layers} is not a multiple of the {schedule.num_stages} stages; "
            "change it, or give the bytes of each stage in --costs"
        )
    return int(args.layers) // schedule.num_stages


@contextlib.contextmanager
def _in_file(name: str) -> Iterator[None]:
    """Errors inside start with the name of the file."""
    from mhc_megatron.pipeline.errors import ScheduleError

    try:
        yield
    except ScheduleError as error:
        raise ScheduleError(f"{name}: {error}") from None


def _read(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"{name}: {reason}; name a readable text file") from error
