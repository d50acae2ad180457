"""What a whole checkpoint consists of: the size and the checksum of every file.

Functions over a folder; ``checkpoint.py`` and ``verify.py`` share their work out to the ranks.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST, CONFIG = "manifest.json", "train_config.json"
_DAMAGED = "damaged"  # made once a checksum was wrong
# SHA-256: the processors of GPU servers have instructions for it, with which it is more than twice
# as fast as BLAKE2b, and sha256sum knows it.
_READ_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of ``manifest.json``.

    Attributes:
        step: completed optimizer steps.
        sizes: bytes of every file, by name.
        checksums: SHA-256 of every file, by name; None in checkpoints of before they were written.
    """

    step: int
    sizes: Mapping[str, int]
    checksums: Mapping[str, str] | None


def list_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first, whole or damaged since."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def mark(folder: Path, *, damaged: bool) -> None:
    """Note beside a checkpoint's files that their checksums are not those saved, or no longer.

    Retention reads the note, since it cannot hash all checkpoints whenever one is saved. Where it
    cannot be written, a checkpoint counts by its sizes.
    """
    with contextlib.suppress(OSError):
        if damaged:
            (folder / _DAMAGED).touch()
        else:
            (folder / _DAMAGED).unlink(missing_ok=True)


def surplus(checkpoints: Sequence[Path], *, keep: int) -> list[Path]:
    """Which of ``checkpoints``, oldest first, may go so that the newest ``keep`` whole ones stay.

    A damaged one does not count, and goes with those that are older than what stays.
    """
    whole = [path for path in checkpoints if _looks_whole(path)]
    stays = set(whole[-keep:])
    first = next((index for index, path in enumerate(checkpoints) if path in stays), 0)
    return list(checkpoints[:first])


def _looks_whole(folder: Path) -> bool:
    manifest = read_manifest(folder)
    if isinstance(manifest, str) or (folder / _DAMAGED).exists():
        return False
    return wrong_size(folder, manifest) is None


def checksum(file: Path) -> str:
    """SHA-256 of a file's contents in hexadecimal digits; read in pieces of 1 MiB."""
    digest, buffer = hashlib.sha256(), bytearray(_READ_BYTES)
    view = memoryview(buffer)
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def written_by(name: str, *, rank: int, world_size: int) -> bool:
    """Whether ``rank`` hashes the file: its own shards, and rank 0 all that is nobody's.

    Megatron calls a shard ``__<rank>_<writer>.distcp``. The rank that wrote it has it in its
    node's page cache, and no rank hashes more than it has written.
    """
    writer = name[2:].partition("_")[0] if name.startswith("__") else ""
    owner = int(writer) if writer.isdecimal() else 0
    return (owner if owner < world_size else 0) == rank


def write_manifest(folder: Path, step: int, checksums: Mapping[str, str]) -> None:
    """Write ``manifest.json`` for the files of which there are checksums, in ``folder``."""
    sizes = {name: (folder / name).stat().st_size for name in sorted(checksums)}
    content = {"step": step, "files": sizes, "sha256": dict(sorted(checksums.items()))}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2))


def read_manifest(folder: Path) -> Manifest | str:
    """The manifest in ``folder``, or what is wrong with it in a few words."""
    try:
        content: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        return Manifest(
            step=int(content["step"]),
            sizes=dict(content["files"]),
            checksums=dict(content["sha256"]) if "sha256" in content else None,
        )
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is not a manifest"


def wrong_size(folder: Path, manifest: Manifest) -> str | None:
    """The first file that is missing or has another size, in a few words; None if none is."""
    for name, size in manifest.sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if (found := file.stat().st_size) != size:
            return f"{name} has {found} bytes instead of {size}"
    return None


def wrong_checksum(folder: Path, manifest: Manifest, names: Iterable[str]) -> str | None:
    """The first of ``names`` whose contents are not those saved; None if all are."""
    for name in names:
        try:
            if checksum(folder / name) != (manifest.checksums or {}).get(name):
                return f"{name} has other contents than were saved"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None
