"""``mhc-megatron trace``: what is hidden behind what in a recorded step."""

import argparse
import json
from pathlib import Path

from mhc_megatron.errors import UserError
from mhc_megatron.report.gpu_kinds import Kind
from mhc_megatron.report.gpu_trace import read_trace
from mhc_megatron.report.overlap import Overlap, measure
from mhc_megatron.report.trace_svg import to_svg


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``mhc-megatron trace``."""
    parser.add_argument("file", metavar="FILE", help="a rank's trace: .json or .json.gz")
    parser.add_argument(
        "--range", metavar="NAME", help="only what a record_function range launched, as 0F3"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers, in nanoseconds")
    parser.add_argument(
        "--svg",
        metavar="FILE",
        help="also draw it, one row per stream, or of many streams one per kind of work",
    )


def run(args: argparse.Namespace) -> int:
    """Print the tables, one per range of that name; returns the exit status.

    Raises:
        UserError: no usable trace, no such range, or an unwritable file.
    """
    trace = read_trace(Path(args.file))
    parts = [trace.work] if args.range is None else trace.launched_in(args.range)
    found = [measure(work, trace.work) for work in parts]
    for index, overlap in enumerate(found):
        if args.range is not None:
            print(f"{args.range}, {index + 1} of {len(found)}")
        print(format_overlap(overlap) + "\n")
    if len(found) > 1:
        print(format_sum(found))
    if args.json is not None:
        numbers = json.dumps([as_json(overlap) for overlap in found], indent=2)
        _write("--json", args.json, numbers + "\n")
    if args.svg is not None:
        drawn = [item for work in parts for item in work]
        _write("--svg", args.svg, to_svg(drawn, measure(drawn, drawn).lanes))
    return 0


def format_overlap(overlap: Overlap) -> str:
    """One window's tables, times in microseconds."""
    lines = [f"{'stream':>6}  {'mostly':13}  {'kernels':>8}  {'busy us':>12}  {'share':>6}"]
    lines += [
        f"{lane.stream:>6}  {lane.name:13}  {lane.count:>8}  {_us(lane.busy)}"
        f"  {lane.busy / max(overlap.window, 1):>6.1%}"
        for lane in overlap.lanes
    ]
    lines += ["", f"{'kind':21}  {'total us':>12}  {'hidden us':>12}  {'exposed us':>12}"]
    lines += [
        f"{kind.value:21}  {_us(time.total)}  {_us(time.hidden)}  {_us(time.exposed)}"
        for kind, time in overlap.kinds.items()
    ]
    lines += [
        f"{'mHC behind compute':21}  {'':12}  {_us(overlap.mhc_behind_compute)}",
        f"{'mHC behind comm.':21}  {'':12}  {_us(overlap.mhc_behind_communication)}",
        f"{'idle':21}  {_us(overlap.idle)}",
        f"{'window':21}  {_us(overlap.window)}",
    ]
    return "\n".join(lines)


def format_sum(found: list[Overlap]) -> str:
    """The sums over several windows, times in microseconds."""
    lines = [f"sum of {len(found)}", f"{'kind':21}  {'total us':>12}  {'exposed us':>12}"]
    for kind in Kind:
        total = sum(overlap.kinds[kind].total for overlap in found)
        exposed = sum(overlap.kinds[kind].exposed for overlap in found)
        lines.append(f"{kind.value:21}  {_us(total)}  {_us(exposed)}")
    lines.append(f"{'idle':21}  {_us(sum(overlap.idle for overlap in found))}")
    lines.append(f"{'window':21}  {_us(sum(overlap.window for overlap in found))}")
    return "\n".join(lines)


def as_json(overlap: Overlap) -> dict[str, object]:
    """An ``Overlap`` for JSON: the names of its fields, kinds by their names."""
    return {
        **vars(overlap),
        "kinds": {kind.value: vars(time) for kind, time in overlap.kinds.items()},
        "lanes": [vars(lane) for lane in overlap.lanes],
    }


def _us(nanoseconds: int) -> str:
    return f"{nanoseconds / 1000:>12,.3f}"


def _write(option: str, name: str, text: str) -> None:
    try:
        Path(name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{option} {name}: {error.strerror}; name a writable file") from error
