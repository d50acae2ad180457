"""``mhc-megatron simulate``: a pipeline schedule on paper.

The modules behind it are imported when it is asked for: other commands need no numpy.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mhc_megatron.errors import UserError

if TYPE_CHECKING:
    from mhc_megatron.pipeline.forecast import Forecast
    from mhc_megatron.pipeline.timeline import Timeline

_DESCRIPTION = """\
Validate and simulate a pipeline schedule, before anything is trained with it: bubbles, step time,
peak activations of every rank.

Without --costs a forward, a dgrad and a wgrad of a stage take 1 each, a whole backward 2, and
messages no time. With --out the timeline is written as SVG, as an HTML page, as a trace for
ui.perfetto.dev, and as text (PyTorch's pipelining CSV).
"""

_EPILOG = """\
schedules:
{schedules}

costs.json, all fields optional; stages default to "default", and stage -1 is the last:
  {{"unit": "ms", "latency": 0.02, "bandwidth": 5e7, "message_bytes": 83886080,
   "default": {{"forward": 2.1, "dgrad": 2.3, "wgrad": 1.9, "backward": 4.0, "overlap": 5.6,
               "recompute": 0.3, "held_bytes": 1000000000, "rebuilt_bytes": 200000000}},
   "stages": {{"0": {{"forward": 2.4}}, "-1": {{"forward": 3.0, "dgrad": 2.9}}}}}}
  Bandwidth is in bytes per unit of time.

examples:
  mhc-megatron simulate --schedule dualpipe_v --ranks 8 --micro-batches 32
  mhc-megatron simulate --schedule zb_h1 --ranks 4 --micro-batches 16 --costs costs.json --out sim
  mhc-megatron simulate --schedule interleaved --chunks 4 --ranks 4 --micro-batches 16
  mhc-megatron simulate --schedule dualpipe_v --ranks 8 --micro-batches 32 --hidden 2560 --seq 4096
  mhc-megatron simulate --schedule dualpipe_v --ranks 4 --micro-batches 16 --overlap all --experts
  mhc-megatron simulate --csv schedule.csv --out sim
"""

# Above this, a trace and a text of the actions would be hundreds of megabytes.
_MAX_WRITTEN = 500_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mhc-megatron simulate``."""
    from mhc_megatron.pipeline.catalogue import CATALOGUE

    schedules = "\n".join(f"  {name:<12} {CATALOGUE[name].summary}" for name in CATALOGUE)
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG.format(schedules=schedules)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = parser.add_argument_group("schedule")
    what.add_argument("--schedule", metavar="NAME", help="one of the schedules below")
    what.add_argument("--ranks", type=int, metavar="P", help="pipeline ranks")
    what.add_argument("--micro-batches", type=int, metavar="M", help="micro-batches of a step")
    what.add_argument("--chunks", type=int, metavar="V", help="stages per rank (interleaved: 2)")
    what.add_argument("--csv", metavar="FILE", help="read the schedule from a text file instead")
    what.add_argument(
        "--place-recompute",
        action="store_true",
        help="rebuild the hyper-connections in actions of their own, before each backward",
    )
    size = parser.add_argument_group("costs and sizes")
    size.add_argument("--costs", metavar="FILE", help="times and bytes of stages (JSON, see below)")
    size.add_argument("--hidden", type=int, metavar="C", help="hidden size; with --seq for bytes")
    size.add_argument("--seq", type=int, metavar="S", help="tokens of a sequence on a rank")
    size.add_argument(
        "--streams",
        type=int,
        metavar="N",
        help="residual streams (default: 4)",
    )
    size.add_argument(
        "--micro-batch-size", type=int, metavar="B", help="sequences of a micro-batch (default: 1)"
    )
    size.add_argument(
        "--layers", type=int, metavar="L", help="layers of the model (default: 1 per stage)"
    )
    size.add_argument(
        "--recompute-block",
        type=int,
        metavar="K",
        help="sublayers rebuilt from one kept state (default: the best; 0 keeps everything)",
    )
    size.add_argument(
        "--messages",
        choices=("model", "fp8"),
        help="what stages send each other, as parallel.messages (default: model)",
    )
    pair = parser.add_argument_group(
        "overlap", "what parallel.overlap makes of a forward beside a backward; layers are alike"
    )
    pair.add_argument(
        "--overlap",
        choices=("post", "recompute", "all"),
        help="interleave their phases; times of stages come from those of the phases",
    )
    pair.add_argument(
        "--phase-costs",
        metavar="FILE",
        help='JSON: {"attention": {"forward": 2.1, "dgrad": 3.0, "wgrad": 1.2}, ..., "slowdowns": '
        '{"compute": {"priority": 1.3}}}, all phases, and how many times as long a lane takes '
        "beside another; without it, rough proportions and no slowdowns",
    )
    pair.add_argument("--experts", action="store_true", help="MLPs are experts (MoE)")
    pair.add_argument(
        "--tensor-parallel",
        choices=("all_reduce", "sequence"),
        help="collectives around attention and MLP (experts keep theirs), without or with sequence "
        "parallelism; --phase-costs are those of a rank's part",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="write timeline.svg, index.html, trace.json and schedule.csv there",
    )


def run(args: argparse.Namespace) -> int:
    """Simulate, print the table, and write the files; returns the exit status.

    Of a deadlock every stuck rank is printed, with its action and what that waits for.

    Raises:
        UserError: the arguments, the cost file or the schedule have to change.
    """
    from mhc_megatron.launch.simulate_inputs import costs_of, pair_of, schedule_of
    from mhc_megatron.pipeline.errors import Deadlock, ScheduleError
    from mhc_megatron.pipeline.recompute import place_recompute
    from mhc_megatron.pipeline.simulate import simulate
    from mhc_megatron.report.lanes import format_lanes
    from mhc_megatron.report.simulation import format_simulation

    try:
        schedule = schedule_of(args)
        pair = pair_of(args, schedule)
        if args.place_recompute:
            ahead = args.overlap in ("recompute", "all")
            schedule = place_recompute(schedule, in_overlaps=not ahead)
        timeline = simulate(schedule, costs_of(args, schedule, pair))
    except Deadlock as error:
        print(error.report())
        raise UserError(f"{error}; move what is waited for forward on its rank") from error
    except ScheduleError as error:
        raise UserError(str(error)) from error
    print(format_simulation(timeline))
    if pair is not None:
        print(f"\n{format_lanes(pair)}")
    if args.out is not None:
        _write(timeline, Path(args.out), pair)
    return 0


def _write(timeline: "Timeline", folder: Path, pair: "Forecast | None") -> None:
    from mhc_megatron.pipeline.draw import to_svg
    from mhc_megatron.pipeline.draw_lanes import lanes_to_svg
    from mhc_megatron.pipeline.text import to_csv
    from mhc_megatron.pipeline.trace import to_chrome_trace
    from mhc_megatron.report.simulation import simulation_page

    svg = to_svg(timeline)
    files = {"timeline.svg": svg, "index.html": simulation_page(timeline, svg)}
    if pair is not None:
        files["overlap.svg"] = lanes_to_svg(pair, "a forward beside a backward")
    number = timeline.schedule.num_actions
    if number <= _MAX_WRITTEN:
        files["trace.json"] = to_chrome_trace(timeline)
        files["schedule.csv"] = to_csv(timeline.schedule)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}; name a writable folder") from error
    print(f"\nwritten: {', '.join(str(folder / name) for name in files)}")
    if number > _MAX_WRITTEN:
        print(f"left out: trace.json and schedule.csv; {number:,} actions, above {_MAX_WRITTEN:,}")
