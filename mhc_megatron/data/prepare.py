"""From text to Megatron's ``.bin``/``.idx``, published only when complete."""

import contextlib
import fcntl
import os
import platform
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)
from tqdm import tqdm

from mhc_megatron.data import corpus
from mhc_megatron.data.documents import Document, find_files, read_documents
from mhc_megatron.data.indexed import num_tokens, open_indexed
from mhc_megatron.data.sidecar import (
    Sidecar,
    read_sidecar,
    sha256_of,
    sidecar_path,
    write_sidecar,
)
from mhc_megatron.data.tokenizer import Tokenizer
from mhc_megatron.errors import UserError

_LONGEST = numpy.iinfo(numpy.int32).max  # the index stores lengths as int32


def prepare(
    inputs: Sequence[str | Path],
    output_prefix: str,
    *,
    tokenizer: Tokenizer,
    jsonl_key: str = "text",
) -> Sidecar:
    """Tokenize text into ``PREFIX.bin``, ``PREFIX.idx`` and ``PREFIX.json``.

    Every document ends in ``tokenizer.eod``; empty documents are passed over. Ids are uint16 where
    the vocabulary allows it, else int32 (Megatron's ``DType.optimal_dtype``). The files appear
    under their names only when all of them are complete: an error or interruption before that
    leaves what was there. A progress bar is shown on a terminal.

    Args:
        inputs: UTF-8 text files (one document each), ``.jsonl`` files (one JSON object per line,
            one document each) and directories of either; see ``find_files``.
        output_prefix: path of the output without an ending; folders are created.
        tokenizer: from ``load_tokenizer``.
        jsonl_key: the key of the text in JSON objects.

    Returns:
        What was written; the content of ``PREFIX.json``.

    Raises:
        UserError: an input is missing, empty or malformed (the message names file and place), or
            the output would overwrite an input or a foreign file, or cannot be written.
    """
    paths = [Path(path) for path in inputs]
    files = find_files(paths)
    if output_prefix.endswith(os.sep) or not Path(output_prefix).name:
        raise UserError(
            f"output {output_prefix!r} has no file name; use a prefix such as data/corpus"
        )
    _refuse_overlap(paths, output_prefix)
    read_sidecar(output_prefix)  # refuses to overwrite a PREFIX.json that is something else

    def documents() -> Iterator[Document]:
        for file in files:
            yield from read_documents(file, jsonl_key=jsonl_key)

    return _write_split(
        documents(),
        output_prefix,
        tokenizer=tokenizer,
        source=_name(paths),
        num_input_bytes=sum(file.stat().st_size for file in files),
    )


def prepare_embedded(folder: str | Path, *, tokenizer: Tokenizer) -> tuple[str, str]:
    """Prepare both splits of the embedded corpus, or reuse what an earlier call prepared.

    Reused only if it came from the same sources and tokenizer and its checksum still holds. Of
    several processes, as of runs that start together, one prepares while the others wait.

    Args:
        folder: where the splits go; created if need be.
        tokenizer: from ``load_tokenizer``.

    Returns:
        The prefixes of the train and the validation split.
    """
    python = f"python{platform.python_version()}"
    slug = re.sub(r"[^A-Za-z0-9]+", "-", tokenizer.name).strip("-")
    source = f"{python} standard library, SHA-256 {corpus.fingerprint()}"
    prefixes = []
    for split in ("train", "valid"):
        prefix = str(Path(folder) / f"{python}-{slug}-{split}")
        with _alone(prefix):
            if not _is_current(prefix, tokenizer=tokenizer, source=f"{source}, {split}"):
                _write_split(
                    corpus.iter_documents(split),
                    prefix,
                    tokenizer=tokenizer,
                    source=f"{source}, {split}",
                    num_input_bytes=None,
                )
        prefixes.append(prefix)
    return prefixes[0], prefixes[1]


@contextlib.contextmanager
def _alone(prefix: str) -> Iterator[None]:
    """Wait until no other process is in here with this prefix."""
    lock = Path(f"{prefix}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise UserError(f"cannot write {prefix}: {error.strerror}; choose another output") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield


def _write_split(
    documents: Iterable[Document],
    prefix: str,
    *,
    tokenizer: Tokenizer,
    source: str,
    num_input_bytes: int | None,
) -> Sidecar:
    final = Path(prefix)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        # Beside the output, so that publishing renames within one file system.
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}-") as folder:
            temporary = os.path.join(folder, "split")
            sidecar = _build(
                documents,
                temporary,
                tokenizer=tokenizer,
                source=source,
                num_input_bytes=num_input_bytes,
            )
            _publish(temporary, prefix)
    except OSError as error:
        raise UserError(f"cannot write {prefix}: {error.strerror}; choose another output") from None
    return sidecar


def _build(
    documents: Iterable[Document],
    prefix: str,
    *,
    tokenizer: Tokenizer,
    source: str,
    num_input_bytes: int | None,
) -> Sidecar:
    builder = IndexedDatasetBuilder(
        get_bin_path(prefix), dtype=DType.optimal_dtype(tokenizer.vocab_size)
    )
    num_documents = num_empty = total_tokens = total_bytes = 0
    # disable=None: no bar unless standard error is a terminal
    with (
        builder.data_file,
        tqdm(total=num_input_bytes, unit="B", unit_scale=True, disable=None) as bar,
    ):
        for document in documents:
            bar.update(document.num_read)
            if not document.text:
                num_empty += 1
                continue
            ids = numpy.array([*tokenizer.encode(document.text), tokenizer.eod], dtype=numpy.int64)
            assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size, tokenizer
            if len(ids) > _LONGEST:
                raise UserError(
                    f"document {num_documents} of {source} has {len(ids)} tokens, above the "
                    f"format's limit of {_LONGEST}; split it"
                )
            builder.add_document(ids, [len(ids)])
            num_documents += 1
            total_tokens += len(ids)
            total_bytes += document.num_bytes
    if num_documents == 0:
        raise UserError(f"no text in {source}; every document is empty")
    builder.finalize(get_idx_path(prefix))
    sidecar = Sidecar(
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        documents=num_documents,
        empty_documents=num_empty,
        tokens=total_tokens,
        bytes=total_bytes,
        bin_sha256=sha256_of(Path(get_bin_path(prefix))),
        source=source,
    )
    write_sidecar(prefix, sidecar)
    return sidecar


def _publish(temporary: str, prefix: str) -> None:
    """Rename the three files so that no moment shows the ``.idx`` of another ``.bin``."""
    sidecar_path(prefix).unlink(missing_ok=True)
    Path(get_idx_path(prefix)).unlink(missing_ok=True)
    os.replace(get_bin_path(temporary), get_bin_path(prefix))
    os.replace(get_idx_path(temporary), get_idx_path(prefix))
    os.replace(sidecar_path(temporary), sidecar_path(prefix))


def _is_current(prefix: str, *, tokenizer: Tokenizer, source: str) -> bool:
    try:
        sidecar = read_sidecar(prefix)
        if sidecar is None:
            return False
        made_from = (sidecar.source, sidecar.tokenizer, sidecar.vocab_size)
        return (
            made_from == (source, tokenizer.name, tokenizer.vocab_size)
            and num_tokens(open_indexed(prefix)) == sidecar.tokens
            and sha256_of(Path(get_bin_path(prefix))) == sidecar.bin_sha256
        )
    except UserError:
        return False  # damaged: prepared again


def _name(inputs: Sequence[Path]) -> str:
    shown = ", ".join(map(str, inputs[:3]))
    return f"{shown} and {len(inputs) - 3} more" if len(inputs) > 3 else shown


def _refuse_overlap(inputs: Sequence[Path], prefix: str) -> None:
    outputs = [Path(path).resolve() for path in (get_bin_path(prefix), get_idx_path(prefix))]
    outputs.append(sidecar_path(prefix).resolve())
    for path in inputs:
        resolved = path.resolve()
        for output in outputs:
            if output == resolved:
                raise UserError(f"output {output} would overwrite that input; choose another --out")
            if resolved in output.parents:
                raise UserError(
                    f"output {prefix} lies inside the input {path} and would be read as text the "
                    "next time; choose an --out elsewhere"
                )
