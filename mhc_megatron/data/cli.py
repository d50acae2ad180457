"""``mhc-megatron data prepare`` and ``mhc-megatron data inspect``.

The modules behind them are imported when a command runs: ``--help`` answers at once, and
``mhc-megatron doctor`` works where megatron-core is missing.
"""

import argparse

_DESCRIPTION = """\
Turn text into training data, and look at what is there.

A corpus is three files with one prefix: PREFIX.bin (token ids) and PREFIX.idx (where documents
begin), both in Megatron's own format, and PREFIX.json (tokenizer, counts, checksum).
"""

_EXAMPLES = """\
examples:
  mhc-megatron data prepare book.txt --out data/train
  mhc-megatron data prepare notes/ extra.jsonl --jsonl-key body --out data/train
  mhc-megatron data inspect data/train
"""

_PREPARE = """\
Tokenize text into PREFIX.bin, PREFIX.idx and PREFIX.json.

Inputs: UTF-8 text files (one document each), .jsonl files (one JSON object per line, one document
each), and directories, whose files are read in sorted order, hidden ones left out. The output
appears only when it is complete.
"""

_INSPECT = """\
Check the files of a prefix and print what they hold.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands of ``mhc-megatron data`` to their parser."""
    raw = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog, parser.formatter_class = _DESCRIPTION, _EXAMPLES, raw
    commands = parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True)

    prepare = commands.add_parser(
        "prepare", help="tokenize text into a corpus", description=_PREPARE, formatter_class=raw
    )
    prepare.add_argument("inputs", nargs="+", metavar="INPUT", help="file or directory to read")
    prepare.add_argument(
        "--out", required=True, metavar="PREFIX", help="output path without an ending"
    )
    prepare.add_argument(
        "--tokenizer",
        default="byte",
        metavar="NAME",
        help="byte (default; one token per UTF-8 byte), tiktoken:ENCODING, or hf:NAME-OR-PATH; "
        "the last two need their library and vocabulary on this machine",
    )
    prepare.add_argument(
        "--jsonl-key",
        default="text",
        metavar="KEY",
        help="key of the text in JSON objects (default: text)",
    )

    inspect = commands.add_parser(
        "inspect", help="check a corpus and print it", description=_INSPECT, formatter_class=raw
    )
    inspect.add_argument("prefix", metavar="PREFIX", help="path without .bin or .idx")


def run(args: argparse.Namespace) -> int:
    """Run a parsed ``mhc-megatron data`` command; returns the exit status.

    Raises:
        UserError: the command cannot be carried out.
    """
    if args.data_command == "prepare":
        return _prepare(args)
    return _inspect(args)


def _prepare(args: argparse.Namespace) -> int:
    from mhc_megatron.data.prepare import prepare
    from mhc_megatron.data.tokenizer import load_tokenizer

    made = prepare(
        args.inputs,
        args.out,
        tokenizer=load_tokenizer(args.tokenizer),
        jsonl_key=args.jsonl_key,
    )
    print(f"wrote {args.out}.bin, {args.out}.idx and {args.out}.json")
    print(f"{made.documents:,} documents, {made.tokens:,} tokens from {made.bytes:,} bytes of text")
    if made.empty_documents:
        print(f"{made.empty_documents:,} empty documents passed over")
    print(f"tokenizer {made.tokenizer}, vocabulary {made.vocab_size:,}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from mhc_megatron.data.describe import describe

    for name, value in describe(args.prefix).items():
        print(f"{name + ':':<18}{value}")
    return 0
