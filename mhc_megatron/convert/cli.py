"""``mhc-megatron convert upcycle`` and ``mhc-megatron convert names``.

The modules behind them are imported when a command runs, so that ``--help`` answers at once.
"""

import argparse
import json
import tempfile
from pathlib import Path

from mhc_megatron.launch.local import launch_local

_DESCRIPTION = """\
Make an mHC model from a plain one, and translate the names of hyper-connections.
"""

_EXAMPLES = """\
examples:
  mhc-megatron convert upcycle runs/plain/checkpoints/step_00000200 --out runs/mhc
  mhc-megatron convert names v4.pt --from deepseek_v4 --to ours --out mhc.pt
  mhc-megatron convert names runs/mhc/checkpoints/step_00000200 --from ours --to megatron --out m.pt
"""

_UPCYCLE = """\
Write OUT/checkpoints/step_00000000: the baseline's weights in an mHC model that computes the same
function, with an optimizer that has made no step. SOURCE is a checkpoint of mhc-megatron train with
model.residual=plain. A run with the same settings and OUT as its folder resumes from it.
"""

_NAMES = """\
Read a model and write it as a state dict under other names, with H_res transposed where the two
differ. SOURCE is a state dict (torch.save, or .safetensors), or a distributed checkpoint: a folder
step_* of mhc-megatron train, or iter_* of Megatron's own loop, saved under any layout. What is
written is one state dict always. DeepSeek-V4's names are known of hyper-connections alone.
"""

_LAYOUTS = ("ours", "megatron", "deepseek_v4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands of ``mhc-megatron convert`` to their parser."""
    raw = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog, parser.formatter_class = _DESCRIPTION, _EXAMPLES, raw
    commands = parser.add_subparsers(dest="convert_command", metavar="COMMAND", required=True)

    upcycle = commands.add_parser(
        "upcycle",
        help="start an mHC model from a plain baseline",
        description=_UPCYCLE,
        formatter_class=raw,
    )
    upcycle.add_argument("source", type=Path, metavar="SOURCE", help="checkpoint folder step_*")
    upcycle.add_argument("--out", required=True, help="folder of the new run")
    upcycle.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="override fields of the baseline's configuration, such as mhc.num_streams=2 steps=500",
    )
    upcycle.set_defaults(run_convert=_run_upcycle)

    names = commands.add_parser(
        "names",
        help="translate the names in a state dict",
        description=_NAMES,
        formatter_class=raw,
    )
    names.add_argument("state", type=Path, metavar="SOURCE", help="state dict or checkpoint")
    names.add_argument("--from", dest="source", required=True, choices=_LAYOUTS)
    names.add_argument("--to", dest="target", required=True, choices=_LAYOUTS)
    names.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write")
    names.add_argument(
        "--only-hyper-connections", action="store_true", help="leave all other entries out"
    )
    names.set_defaults(run_convert=_run_names)


def run(args: argparse.Namespace) -> int:
    """Run the chosen sub-command; the exit status."""
    status: int = args.run_convert(args)
    return status


def _run_upcycle(args: argparse.Namespace) -> int:
    from mhc_megatron.convert.upcycle import upcycled_config
    from mhc_megatron.training.overrides import to_dict

    config = upcycled_config(args.source, args.overrides, out=args.out)
    with tempfile.TemporaryDirectory(prefix="mhc-megatron-") as folder:
        file = Path(folder) / "train_config.json"
        file.write_text(json.dumps(to_dict(config)))
        arguments = [str(args.source), str(file)]
        return launch_local("mhc_megatron.convert.worker", arguments, num_processes=1)


def _run_names(args: argparse.Namespace) -> int:
    from mhc_megatron.convert.distributed import read_distributed
    from mhc_megatron.convert.files import read_state, write_state
    from mhc_megatron.convert.names import convert_names

    only = args.only_hyper_connections
    if args.state.is_dir():
        before = read_distributed(args.state, args.source, only_hyper_connections=only)
    else:
        before = read_state(args.state)
    after = convert_names(before, args.source, args.target, only_hyper_connections=only)
    write_state(after, args.out)
    print(f"{args.out}: {len(after)} entries from the {len(before)} of {args.state}")
    return 0
