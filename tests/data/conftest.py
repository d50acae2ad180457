"""Small corpora whose every token id is known."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from mhc_megatron.data.prepare import prepare
from mhc_megatron.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class NumberTokenizer(Tokenizer):
    """Tokens are decimal numbers between spaces, so that a test can choose the ids."""

    name: str = "numbers"
    vocab_size: int = 1000
    eod: int = 999

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def numbers(start: int, stop: int) -> str:
    return " ".join(map(str, range(start, stop)))


@pytest.fixture
def number_tokenizer() -> NumberTokenizer:
    return NumberTokenizer()


@pytest.fixture
def splits(tmp_path: Path, number_tokenizer: NumberTokenizer) -> tuple[str, str]:
    """Train: ids 0 .. 499 in 5 documents of 100; validation: ids 500 .. 699 in one."""
    files = []
    for first in range(0, 500, 100):
        files.append(tmp_path / f"train{first:03}.txt")
        files[-1].write_text(numbers(first, first + 100))
    valid = tmp_path / "valid.txt"
    valid.write_text(numbers(500, 700))
    prefixes = str(tmp_path / "data" / "train"), str(tmp_path / "data" / "valid")
    prepare(files, prefixes[0], tokenizer=number_tokenizer)
    prepare([valid], prefixes[1], tokenizer=number_tokenizer)
    return prefixes
