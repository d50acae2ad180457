"""Preparation: exact content, whole files or none, idempotence."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from mhc_megatron.data.indexed import open_indexed
from mhc_megatron.data.prepare import prepare, prepare_embedded
from mhc_megatron.data.sidecar import read_sidecar, sha256_of
from mhc_megatron.data.tokenizer import ByteTokenizer, Tokenizer
from mhc_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class FailsOn(ByteTokenizer):
    """Raises when it meets a document that begins with a word."""

    word: str
    error: BaseException

    def encode(self, text: str) -> list[int]:
        if text.startswith(self.word):
            raise self.error
        return super().encode(text)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def documents_of(prefix: str) -> list[list[int]]:
    dataset = open_indexed(prefix)  # its arrays end with it
    return [dataset[i].tolist() for i in range(len(dataset))]


def text_file(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_content(tmp_path: Path) -> None:
    first = text_file(tmp_path / "in" / "a.txt", "ab")
    text_file(tmp_path / "in" / "b" / "c.jsonl", '{"text": "é"}\n{"text": ""}\n{"text": "z"}\n')
    prefix = str(tmp_path / "new" / "folder" / "corpus")
    made = prepare([first, tmp_path / "in"], prefix, tokenizer=ByteTokenizer())

    documents = [[97, 98, 256], [97, 98, 256], [0xC3, 0xA9, 256], [122, 256]]
    assert documents_of(prefix) == documents
    dataset = IndexedDataset(prefix)
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert dataset.index.dtype is numpy.uint16
    assert (made.documents, made.empty_documents, made.tokens, made.bytes) == (4, 1, 11, 7)
    assert (made.tokenizer, made.vocab_size) == ("byte", 257)
    assert made.bin_sha256 == sha256_of(Path(f"{prefix}.bin"))
    assert read_sidecar(prefix) == made
    assert sorted(files_of(tmp_path / "new")) == [
        "folder/corpus.bin",
        "folder/corpus.idx",
        "folder/corpus.json",
    ]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, numpy.uint16), (65_500, numpy.int32)])
def test_dtype_follows_the_vocabulary(
    vocab_size: int, dtype: type, tmp_path: Path, number_tokenizer: Tokenizer
) -> None:
    largest = vocab_size - 1
    tokenizer = replace(number_tokenizer, vocab_size=vocab_size, eod=0)
    prefix = str(tmp_path / "out")
    prepare([text_file(tmp_path / "a.txt", f"1 {largest}")], prefix, tokenizer=tokenizer)
    dataset = open_indexed(prefix)
    assert dataset.index.dtype is dtype
    assert dataset[0].tolist() == [1, largest, 0]


def test_same_input_gives_the_same_files(tmp_path: Path) -> None:
    source = text_file(tmp_path / "a.txt", "text")
    for folder in ("one", "two"):
        prepare([source], str(tmp_path / folder / "out"), tokenizer=ByteTokenizer())
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), UserError("bad")])
def test_error_in_the_middle_leaves_everything_as_it_was(
    error: BaseException, tmp_path: Path
) -> None:
    good, bad = text_file(tmp_path / "a.txt", "good"), text_file(tmp_path / "b.txt", "bad")
    out = tmp_path / "out"
    out.mkdir()
    failing = FailsOn(word="bad", error=error)
    with pytest.raises(type(error)):
        prepare([good, bad], str(out / "corpus"), tokenizer=failing)
    assert list(out.iterdir()) == []

    prepare([good], str(out / "corpus"), tokenizer=ByteTokenizer())
    before = files_of(out)
    with pytest.raises(type(error)):
        prepare([good, bad], str(out / "corpus"), tokenizer=failing)
    assert files_of(out) == before
    assert len(list(out.iterdir())) == 3


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_stopped_while_publishing_never_shows_a_mixed_pair(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = str(tmp_path / "out")
    # Of equal length, so that sizes alone would not tell the two versions apart.
    old, new = text_file(tmp_path / "a.txt", "old"), text_file(tmp_path / "b.txt", "new")
    prepare([old], prefix, tokenizer=ByteTokenizer())
    done: list[str] = []
    real_replace = os.replace

    def stop_after(source: str, target: str) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", stop_after)
    with pytest.raises(KeyboardInterrupt):
        prepare([new], prefix, tokenizer=ByteTokenizer())
    assert read_sidecar(prefix) is None
    if renames < 2:
        with pytest.raises(UserError, match=r"out\.idx not found"):
            open_indexed(prefix)
    else:
        assert documents_of(prefix) == [[*b"new", 256]]


def test_all_documents_empty(tmp_path: Path) -> None:
    source = text_file(tmp_path / "a.jsonl", '{"text": ""}\n\n')
    with pytest.raises(UserError, match=r"no text in .*a\.jsonl"):
        prepare([source], str(tmp_path / "out"), tokenizer=ByteTokenizer())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_inputs_are_never_overwritten(tmp_path: Path) -> None:
    source = text_file(tmp_path / "notes.json", "text")
    with pytest.raises(UserError, match=r"notes\.json would overwrite that input"):
        prepare([source], str(tmp_path / "notes"), tokenizer=ByteTokenizer())
    with pytest.raises(UserError, match="lies inside the input"):
        prepare([tmp_path], str(tmp_path / "deep" / "out"), tokenizer=ByteTokenizer())
    other = text_file(tmp_path / "other.txt", "text")
    with pytest.raises(UserError, match=r"notes\.json does not describe a prepared corpus"):
        prepare([other], str(tmp_path / "notes"), tokenizer=ByteTokenizer())
    assert files_of(tmp_path) == {"notes.json": b"text", "other.txt": b"text"}


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    source = text_file(tmp_path / "a.txt", "text")
    with pytest.raises(UserError, match=r"cannot write .*file/out: .*; choose another output"):
        prepare([source], str(text_file(tmp_path / "file", "") / "out"), tokenizer=ByteTokenizer())
    with pytest.raises(UserError, match="has no file name"):
        prepare([source], f"{tmp_path}/folder/", tokenizer=ByteTokenizer())


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of five files; turtle.py is the one that validates."""
    root = tmp_path / "library"
    for name in ("abc.py", "ast.py", "bisect.py", "json/tool.py", "turtle.py"):
        text_file(root / name, f"# {name}\n")
    monkeypatch.setattr("mhc_megatron.data.corpus._standard_library", lambda: root)
    return root


def embedded_texts(prefixes: Sequence[str]) -> list[list[str]]:
    decode = ByteTokenizer().decode
    return [[decode(ids) for ids in documents_of(prefix)] for prefix in prefixes]


def test_embedded_splits(library: Path, tmp_path: Path) -> None:
    prefixes = prepare_embedded(tmp_path / "data", tokenizer=ByteTokenizer())
    assert embedded_texts(prefixes) == [
        ["# abc.py\n", "# ast.py\n", "# bisect.py\n", "# json/tool.py\n"],
        ["# turtle.py\n"],
    ]


def test_embedded_is_reused_only_if_whole_and_current(library: Path, tmp_path: Path) -> None:
    def prepared() -> tuple[tuple[str, str], list[int]]:
        prefixes = prepare_embedded(tmp_path / "data", tokenizer=ByteTokenizer())
        return prefixes, [os.stat(f"{prefix}.bin").st_ino for prefix in prefixes]

    prefixes, first = prepared()
    assert prepared() == (prefixes, first)

    text_file(library / "ast.py", "# new\n")
    _, changed = prepared()
    assert changed != first and "# new\n" in embedded_texts(prefixes)[0]

    whole = files_of(tmp_path / "data")
    for ending in (".bin", ".idx", ".json"):
        path = Path(prefixes[0] + ending)
        for damaged in (path.read_bytes()[:-3], b"?" + path.read_bytes()[1:]):
            path.write_bytes(damaged)
            prepared()
            assert files_of(tmp_path / "data") == whole


def test_embedded_is_prepared_once_by_several_at_a_time(library: Path, tmp_path: Path) -> None:
    encoded: list[str] = []

    @dataclass(frozen=True, kw_only=True)
    class Slow(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            encoded.append(text)
            time.sleep(0.05)
            return super().encode(text)

    def prepared(_: int) -> list[list[str]]:
        return embedded_texts(prepare_embedded(tmp_path / "data", tokenizer=Slow()))

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(prepared, range(4))
    assert others == [first] * 3
    assert sorted(encoded) == sorted(text for split in first for text in split)


def test_embedded_keeps_tokenizers_apart(
    library: Path, tmp_path: Path, number_tokenizer: Tokenizer
) -> None:
    for name in ("abc.py", "ast.py", "bisect.py", "json/tool.py", "turtle.py"):
        text_file(library / name, "1 2 3")
    one = prepare_embedded(tmp_path / "data", tokenizer=ByteTokenizer())
    other = prepare_embedded(tmp_path / "data", tokenizer=number_tokenizer)
    assert not set(one) & set(other)
    assert documents_of(other[1]) == [[1, 2, 3, 999]]
