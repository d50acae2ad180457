"""Megatron's ``.bin``/``.idx`` pair: opening it with every fault named, and scanning its ids."""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDataset,
    get_bin_path,
    get_idx_path,
)

from mhc_megatron.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
# magic, version, dtype code, number of sequences, number of document boundaries
_HEADER = struct.Struct("<9sQBQQ")
_CHUNK = 1 << 24  # ids scanned at a time: 32 to 128 MiB


def open_indexed(prefix: str) -> IndexedDataset:
    """Open a prefix (memory-mapped) after checking that both files are there and whole.

    Keep the dataset for as long as its arrays are used: it unmaps them when it is collected.

    Raises:
        UserError: a file is missing, the index is damaged, the corpus is empty, the ids are not
            integers, or the ``.bin`` is not as long as the index says.
    """
    missing = [path for path in (get_bin_path(prefix), get_idx_path(prefix)) if _is_missing(path)]
    if missing:
        hint = "write it with: mhc-megatron data prepare"
        if prefix.endswith((".bin", ".idx")):
            hint = f"give the prefix without its ending: {prefix[:-4]}"
        raise UserError(f"{' and '.join(missing)} not found; {hint}")
    # A damaged file must not reach IndexedDataset: half-built, it fails again when collected.
    item_size = _check_index(Path(get_idx_path(prefix)))
    bin_size = Path(get_bin_path(prefix)).stat().st_size
    if bin_size == 0:
        raise UserError(f"{get_bin_path(prefix)} holds no tokens; prepare it from inputs with text")
    dataset = IndexedDataset(prefix)
    expected = int(dataset.sequence_lengths.sum(dtype=numpy.int64)) * item_size
    if bin_size != expected:
        raise UserError(
            f"{get_bin_path(prefix)} has {bin_size} bytes but its index counts {expected}: it is "
            "truncated or belongs to another .idx; prepare it again"
        )
    return dataset


def find_beyond(prefix: str, dataset: IndexedDataset, *, vocab_size: int) -> tuple[int, int] | None:
    """The first token id outside ``[0, vocab_size)`` and its position in the ``.bin``, or None."""
    position = 0
    for ids in _chunks(prefix, dataset):
        if ids.max() >= vocab_size or ids.min() < 0:
            first = int(numpy.argmax((ids >= vocab_size) | (ids < 0)))
            return int(ids[first]), position + first
        position += len(ids)
    return None


def largest_id(prefix: str, dataset: IndexedDataset) -> int:
    """The largest token id in the ``.bin``."""
    return max(int(ids.max()) for ids in _chunks(prefix, dataset))


def num_tokens(dataset: IndexedDataset) -> int:
    """Token ids in all sequences."""
    return int(dataset.sequence_lengths.sum(dtype=numpy.int64))


def _is_missing(path: str) -> bool:
    return not Path(path).is_file()


def _check_index(path: Path) -> int:
    """Check an ``.idx`` by its header and size; returns the bytes of one token id."""
    size = path.stat().st_size
    content = numpy.memmap(path, mode="r") if size else numpy.empty(0, numpy.uint8)
    header = content[: _HEADER.size].tobytes()
    if len(header) < _HEADER.size:
        raise UserError(f"{path} has {size} bytes, less than its header; prepare it again")
    magic, version, code, num_sequences, num_boundaries = _HEADER.unpack(header)
    if magic != _MAGIC or version != 1:
        raise UserError(f"{path} is not a Megatron index; prepare it again")
    # Per sequence an int32 length and an int64 offset; per boundary an int64.
    expected = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if size != expected:
        raise UserError(
            f"{path} has {size} bytes but its header counts {expected}: it is truncated or not "
            "a text corpus; prepare it again"
        )
    if num_sequences == 0 or num_boundaries == 0:
        raise UserError(f"{path} holds no documents; prepare it from inputs with text")
    last_boundary = int.from_bytes(content[-8:].tobytes(), "little")
    if last_boundary != num_sequences or code not in {item.value for item in DType}:
        raise UserError(f"{path} is damaged; prepare it again")
    dtype = numpy.dtype(DType.dtype_from_code(code))
    if dtype.kind not in "iu":
        raise UserError(f"{path} declares {dtype} values, not token ids; prepare it again")
    return dtype.itemsize


def _chunks(prefix: str, dataset: IndexedDataset) -> Iterator[numpy.ndarray]:
    ids = numpy.memmap(get_bin_path(prefix), dtype=dataset.index.dtype, mode="r")
    for start in range(0, len(ids), _CHUNK):
        yield ids[start : start + _CHUNK]
