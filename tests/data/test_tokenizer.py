"""Tokenizers: exact round trips; libraries that are missing or would download are named."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhc_megatron.data.tokenizer import load_tokenizer
from mhc_megatron.errors import UserError

# Code points that UTF-8 can encode: all but surrogates.
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]))


@given(TEXT)
def test_byte_round_trip(text: str) -> None:
    tokenizer = load_tokenizer("byte")
    ids = tokenizer.encode(text)
    assert bytes(ids) == text.encode("utf-8")
    assert tokenizer.decode([*ids, tokenizer.eod]) == text


def test_byte_vocabulary() -> None:
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    assert tokenizer.unique_identifiers == {"name": "byte", "vocab_size": 257, "eod": 256}
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\N{REPLACEMENT CHARACTER}"
    # Megatron takes a missing pad for -1; one among the byte values would hide real text.
    assert not hasattr(tokenizer, "pad")


@pytest.mark.parametrize("name", ["bytes", "", "tiktoken:", "hf:", "gpt2", "hf"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(UserError, match=r"is unknown; use one of byte, tiktoken:ENCODING, hf:"):
        load_tokenizer(name)


@pytest.mark.parametrize(
    ("name", "package"), [("tiktoken:a", "tiktoken"), ("hf:a", "transformers")]
)
def test_missing_library(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"{name}' needs {package} .*: pip install {package}$"):
        load_tokenizer(name)


class Letters:
    """A tiktoken encoding of single bytes, as tiktoken's ``Encoding``."""

    n_vocab = 300

    def __init__(self, special: dict[str, int]) -> None:
        self.special = special

    @property
    def eot_token(self) -> int:
        return self.special["<|endoftext|>"]

    def encode_ordinary(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: list[int], errors: str) -> str:
        return bytes(ids).decode("utf-8", errors=errors)


@pytest.fixture
def tiktoken(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    library: Any = ModuleType("tiktoken")
    load: Any = ModuleType("tiktoken.load")

    def get_encoding(name: str) -> Letters:
        if name == "remote":
            load.read_file("somewhere")
        return Letters({} if name == "endless" else {"<|endoftext|>": 299})

    def read_file(path: str) -> bytes:
        raise AssertionError(f"{path} would be downloaded")

    library.load, load.read_file = load, read_file
    library.get_encoding = get_encoding
    library.list_encoding_names = lambda: ["remote", "endless", "letters"]
    monkeypatch.setitem(sys.modules, "tiktoken", library)
    monkeypatch.setitem(sys.modules, "tiktoken.load", load)
    return library


def test_tiktoken(tiktoken: ModuleType) -> None:
    tokenizer = load_tokenizer("tiktoken:letters")
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eod) == ("tiktoken:letters", 300, 299)
    assert tokenizer.decode([*tokenizer.encode("wörld"), 299]) == "wörld"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("remote", r"not in tiktoken's cache; fetch it once with: python -c"),
        ("endless", "no end-of-text token"),
        ("other", "no encoding 'other'; it has endless, letters, remote"),
    ],
)
def test_tiktoken_refuses(name: str, message: str, tiktoken: ModuleType) -> None:
    with pytest.raises(UserError, match=message):
        load_tokenizer(f"tiktoken:{name}")


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    library: Any = ModuleType("transformers")

    def from_pretrained(name: str, *, local_files_only: bool) -> SimpleNamespace:
        assert local_files_only
        if name == "remote":
            raise OSError("no such file\nsecond line")
        return SimpleNamespace(
            eos_token_id=None if name == "endless" else 7,
            get_vocab=lambda: {"a": 1, "b": 7, "added later": 41},
            encode=lambda text, **options: [1] * len(text),
            decode=lambda ids, **options: "a" * len(ids),
        )

    library.AutoTokenizer = SimpleNamespace(from_pretrained=from_pretrained)
    monkeypatch.setitem(sys.modules, "transformers", library)
    return library


def test_hugging_face(transformers: ModuleType) -> None:
    tokenizer = load_tokenizer("hf:local")
    # Ids have gaps: the vocabulary must reach past the largest, not count them.
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eod) == ("hf:local", 42, 7)
    assert tokenizer.decode([*tokenizer.encode("aaa"), 7]) == "aaa"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("remote", r"\(no such file\); fetch it once with: hf download remote$"),
        ("endless", "no end-of-text token"),
    ],
)
def test_hugging_face_refuses(name: str, message: str, transformers: ModuleType) -> None:
    with pytest.raises(UserError, match=message):
        load_tokenizer(f"hf:{name}")
