"""The embedded corpus: the standard-library sources of the running Python.

Real text that every machine has. Two machines with the same Python release have the same files, up
to what a distribution leaves out.
"""

import hashlib
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from mhc_megatron.data.documents import Document
from mhc_megatron.errors import UserError

Split = Literal["train", "valid"]

_VALID_PERCENT = 5
_SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "site-packages",
    "test",
    "tests",
}


def list_files(*, root: Path | None = None) -> list[str]:
    """Relative POSIX paths of the corpus, sorted.

    Left out: tests (some are deliberately not valid text), installed packages, and the build
    configuration, which differs between machines.

    Args:
        root: the standard library to read; None means the running Python's.

    Raises:
        UserError: there are no sources (some Pythons ship only compiled files).
    """
    root = root or _standard_library()
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    kept = [name for name in names if _belongs(name)]
    if not kept:
        raise UserError(
            f"{root} holds no Python sources, so there is no embedded corpus; prepare your own "
            "with: mhc-megatron data prepare"
        )
    return kept


def split_of(name: str) -> Split:
    """The split of a file, from a hash of its relative path: about 5 % of the files validate."""
    digest = hashlib.sha256(name.encode("utf-8")).digest()
    return "valid" if int.from_bytes(digest[:8], "big") % 100 < _VALID_PERCENT else "train"


def iter_documents(split: Split, *, root: Path | None = None) -> Iterator[Document]:
    """The files of one split in sorted order, one document each, decoded as Python does."""
    root = root or _standard_library()
    for name in list_files(root=root):
        if split_of(name) == split:
            with tokenize.open(root / name) as file:
                text = file.read()
            num_bytes = len(text.encode("utf-8"))
            yield Document(text=text, num_bytes=num_bytes, num_read=num_bytes)


def fingerprint(*, root: Path | None = None) -> str:
    """SHA-256 over the paths and contents of both splits: what the prepared files came from."""
    root = root or _standard_library()
    digest = hashlib.sha256()
    for name in list_files(root=root):
        content = (root / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _belongs(name: str) -> bool:
    *folders, file = name.split("/")
    generated = file.startswith("_sysconfigdata") or any(f.startswith("config-") for f in folders)
    return not generated and _SKIPPED_FOLDERS.isdisjoint(folders)
