"""``mhc-megatron report``.

The modules behind it are imported when it runs: ``--help`` answers without matplotlib.
"""

import argparse
from pathlib import Path

from mhc_megatron.errors import UserError

_DESCRIPTION = """\
Draw the report of finished or running trainings.

One run folder: writes report.html into it. Several: writes one page that compares them, the first
being the baseline, and prints its table.
"""

_EXAMPLES = """\
examples:
  mhc-megatron report runs/stdlib-small
  mhc-megatron report runs/a/plain runs/a/mhc --out comparison.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``mhc-megatron report``."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folders", nargs="+", metavar="RUN_FOLDER", help="run directory (--out)")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="where a comparison goes (default: comparison.html beside the first run folder)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the report or the comparison; returns the exit status.

    Raises:
        UserError: a folder is no run, or the arguments do not fit together.
    """
    from mhc_megatron.report.compare import format_table, summaries, write_comparison
    from mhc_megatron.report.html import write_report

    if len(args.folders) == 1:
        if args.out is not None:
            raise UserError(
                f"--out={args.out} is for comparisons; one run's report goes into its own folder"
            )
        print(f"report: {write_report(args.folders[0])}")
        return 0
    named = _named([Path(folder) for folder in args.folders])
    out = Path(args.out) if args.out else Path(args.folders[0]).parent / "comparison.html"
    path = write_comparison(named, out)
    print(format_table(summaries(named)))
    print(f"comparison: {path}")
    return 0


def _named(folders: list[Path]) -> dict[str, Path]:
    """Run folders by their own names, or by their whole paths where those are the same."""
    short = [folder.resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"run folder {twice!r} is named twice; name each run once")
    return dict(zip(names, folders, strict=True))
