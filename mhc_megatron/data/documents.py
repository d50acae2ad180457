"""Documents from text files, directories and JSON Lines, with errors that name the place."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mhc_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text.

    Attributes:
        text: the text, never with lone surrogates; may be empty.
        num_bytes: its length in UTF-8.
        num_read: input bytes it was read from (for a JSON line, the whole line).
    """

    text: str
    num_bytes: int
    num_read: int


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """The files that the inputs name, in the order given; a directory's sorted by path.

    Hidden files and folders (a leading dot) inside a directory are left out. A named file must not
    be empty; an empty one inside a directory is kept and yields an empty document.

    Raises:
        UserError: an input does not exist or is empty.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = _walk(path)
            if not inside:
                raise UserError(f"input {path} is a directory without files; name one with text")
            files += inside
        elif path.is_file():
            if path.stat().st_size == 0:
                raise UserError(f"input {path} is empty; leave it out")
            files.append(path)
        elif path.exists():
            raise UserError(f"input {path} is neither a file nor a directory; name one of these")
        else:
            raise UserError(f"input {path} does not exist; check the path")
    return files


def read_documents(path: Path, *, jsonl_key: str) -> Iterator[Document]:
    """The documents of a file: one per line of ``*.jsonl``, else the whole file as UTF-8.

    Blank lines of a ``.jsonl`` are passed over; of every other line ``jsonl_key`` is the text.

    Raises:
        UserError: unreadable file, invalid UTF-8 (with its byte offset), invalid JSON, missing key
            or a value that is not text (each with its line number).
    """
    try:
        if path.suffix == ".jsonl":
            yield from _read_json_lines(path, jsonl_key)
        else:
            content = path.read_bytes()
            text = _decode(content, path, 0)
            yield Document(text=text, num_bytes=len(content), num_read=len(content))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the file") from None


def _walk(root: Path) -> list[Path]:
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        files += [path for path in paths if path.is_file()]
    return sorted(files)


def _read_json_lines(path: Path, key: str) -> Iterator[Document]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            content = _decode(line, path, offset)
            offset += len(line)
            if not content.strip():
                continue
            text = _text_of_line(content, f"{path}, line {number}", key)
            num_bytes = len(text.encode("utf-8"))
            yield Document(text=text, num_bytes=num_bytes, num_read=len(line))


def _decode(content: bytes, path: Path, offset: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 at byte {offset + error.start} "
            f"(0x{content[error.start]:02x}: {error.reason}); convert it or leave it out"
        ) from None


def _text_of_line(line: str, place: str, key: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place}: invalid JSON at column {error.colno} ({error.msg}); "
            "a .jsonl file holds one object per line"
        ) from None
    if not isinstance(record, dict):
        raise UserError(
            f"{place}: a JSON {type(record).__name__} where an object with the key {key!r} is "
            "needed"
        )
    if key not in record:
        found = ", ".join(map(repr, record)) or "none"
        raise UserError(f"{place}: no key {key!r}; the keys are: {found} (choose with --jsonl-key)")
    text = record[key]
    if not isinstance(text, str):
        raise UserError(
            f"{place}: the value of {key!r} is {type(text).__name__}, not text; "
            "choose another with --jsonl-key"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: the value of {key!r} has half a surrogate pair at character {error.start}, "
            "which is not text; repair the line"
        ) from None
    return text
