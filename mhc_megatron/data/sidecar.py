"""``PREFIX.json``, written last next to ``.bin`` and ``.idx``: what they are and came from."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from mhc_megatron.errors import UserError

_FORMAT = "mhc-megatron data 1"
_MAX_BYTES = 1 << 20  # a larger file is somebody's data: not read


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """Description of a prepared split.

    Attributes:
        tokenizer: its name, as ``load_tokenizer`` takes it.
        vocab_size: its number of token ids; no id in the ``.bin`` reaches it.
        documents: documents written, each ending in the end-of-document token.
        empty_documents: documents without text, passed over.
        tokens: token ids written, the end-of-document tokens included.
        bytes: UTF-8 bytes of the text.
        bin_sha256: checksum of the ``.bin``.
        source: what the text came from.
    """

    tokenizer: str
    vocab_size: int
    documents: int
    empty_documents: int
    tokens: int
    bytes: int
    bin_sha256: str
    source: str


def sidecar_path(prefix: str) -> Path:
    """Where the sidecar of a prefix lies."""
    return Path(f"{prefix}.json")


def write_sidecar(prefix: str, sidecar: Sidecar) -> None:
    """Write the sidecar of a prefix."""
    content = json.dumps({"format": _FORMAT, **asdict(sidecar)}, indent=2)
    sidecar_path(prefix).write_text(content + "\n", encoding="utf-8")


def read_sidecar(prefix: str) -> Sidecar | None:
    """Read the sidecar of a prefix; None if there is none (data prepared by another tool).

    Raises:
        UserError: the file is there but is not a sidecar.
    """
    path = sidecar_path(prefix)
    if not path.exists():
        return None
    if path.stat().st_size > _MAX_BYTES:
        raise _foreign(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != _FORMAT:
            raise ValueError
        sidecar = Sidecar(**content)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        raise _foreign(path) from None
    if any(type(getattr(sidecar, field.name)) is not field.type for field in fields(sidecar)):
        raise _foreign(path)
    return sidecar


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _foreign(path: Path) -> UserError:
    return UserError(
        f"{path} does not describe a prepared corpus; move it away or choose another prefix"
    )
