"""What a corpus holds, in words."""

from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import IndexedDataset, get_bin_path

from mhc_megatron.data.indexed import largest_id, num_tokens, open_indexed
from mhc_megatron.data.sidecar import Sidecar, read_sidecar, sha256_of
from mhc_megatron.data.tokenizer import load_tokenizer
from mhc_megatron.errors import UserError

_SHOWN_TOKENS = 80


def describe(prefix: str) -> dict[str, str]:
    """Label and value of each fact about a corpus, in the order to print them.

    Raises:
        UserError: the files are missing or damaged, or differ from what their sidecar says.
    """
    dataset = open_indexed(prefix)
    sidecar = read_sidecar(prefix)
    if sidecar is not None and sha256_of(Path(get_bin_path(prefix))) != sidecar.bin_sha256:
        raise UserError(
            f"{get_bin_path(prefix)} has changed since it was prepared (checksum differs); "
            "prepare it again"
        )
    tokens = num_tokens(dataset)
    ends = numpy.concatenate([[0], numpy.cumsum(dataset.sequence_lengths, dtype=numpy.int64)])
    lengths = numpy.diff(ends[dataset.document_indices])
    longest = int(numpy.argmax(lengths))
    facts = {
        "documents": f"{len(lengths):,}",
        "tokens": f"{tokens:,} ({numpy.dtype(dataset.index.dtype).name})",
        "largest token id": f"{largest_id(prefix, dataset):,}",
        "longest document": f"{lengths[longest]:,} tokens (document {longest:,})",
    }
    return facts | _about_tokenizer(sidecar) | {"begins": _beginning(dataset, sidecar)}


def _about_tokenizer(sidecar: Sidecar | None) -> dict[str, str]:
    if sidecar is None:
        return {"tokenizer": "unknown (no .json: prepared by another tool)"}
    return {
        "tokenizer": sidecar.tokenizer,
        "vocabulary": f"{sidecar.vocab_size:,}",
        "text": f"{sidecar.bytes:,} bytes",
        "source": sidecar.source,
        "checksum": "matches",
    }


def _beginning(dataset: IndexedDataset, sidecar: Sidecar | None) -> str:
    length = min(_SHOWN_TOKENS, int(dataset.sequence_lengths[0]))
    ids = dataset.get(0, length=length).tolist()
    if sidecar is None:
        return f"token ids {ids}"
    return repr(load_tokenizer(sidecar.tokenizer).decode(ids))
