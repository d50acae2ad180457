"""Tokenizers by name: the embedded byte level, or one that an installed library provides."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

from mhc_megatron.errors import UserError

NAMES = "byte, tiktoken:ENCODING, hf:NAME-OR-PATH"


@dataclass(frozen=True, kw_only=True)
class Tokenizer(ABC):
    """What preparation, sampling and the model need from a tokenizer.

    Megatron's ``GPTDatasetConfig`` reads ``vocab_size``, ``eod`` and ``unique_identifiers``. There
    is no ``pad``: Megatron then pads with -1, which no document can contain.

    Attributes:
        name: the name that ``load_tokenizer`` takes.
        vocab_size: one more than the largest token id.
        eod: the id appended to every document.
    """

    name: str
    vocab_size: int
    eod: int

    @property
    def unique_identifiers(self) -> dict[str, str | int]:
        """What distinguishes this tokenizer in the key of Megatron's sample-index cache."""
        return {"name": self.name, "vocab_size": self.vocab_size, "eod": self.eod}

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a document, without ``eod``."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids: ``eod`` gives nothing, a cut character the replacement character."""


@dataclass(frozen=True, kw_only=True)
class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte: ids 0 to 255 are the byte values, 256 is ``eod``."""

    name: str = "byte"
    vocab_size: int = 257
    eod: int = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i != self.eod).decode("utf-8", errors="replace")


@dataclass(frozen=True, kw_only=True)
class TiktokenTokenizer(Tokenizer):
    """An encoding of the tiktoken library; special tokens in a document are ordinary text."""

    encoding: Any

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.encoding.decode([i for i in ids if i != self.eod], errors="replace")


@dataclass(frozen=True, kw_only=True)
class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the transformers library; its end-of-sequence token is ``eod``.

    Special tokens written out in a document are ordinary text.
    """

    tokenizer: Any

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )

    def decode(self, ids: Sequence[int]) -> str:
        kept = [i for i in ids if i != self.eod]
        return self.tokenizer.decode(kept, clean_up_tokenization_spaces=False)


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer that is on this machine; nothing is downloaded.

    Args:
        name: ``byte``, ``tiktoken:ENCODING`` (such as ``tiktoken:gpt2``) or ``hf:NAME-OR-PATH``.

    Raises:
        UserError: the name is unknown, its library is not installed, its vocabulary is not on
            this machine, or it has no token that ends a document.
    """
    kind, _, which = name.partition(":")
    if name == "byte":
        return ByteTokenizer()
    if kind == "tiktoken" and which:
        return _load_tiktoken(name, which)
    if kind == "hf" and which:
        return _load_hugging_face(name, which)
    raise UserError(f"tokenizer {name!r} is unknown; use one of {NAMES}")


class _NotOnThisMachine(Exception):
    """tiktoken asked for a vocabulary file that its cache does not hold."""


def _load_tiktoken(name: str, which: str) -> Tokenizer:
    try:
        import tiktoken.load
    except ImportError as error:
        raise _not_installed(name, "tiktoken", error) from None
    if which not in tiktoken.list_encoding_names():
        raise UserError(
            f"tokenizer {name!r}: tiktoken has no encoding {which!r}; it has "
            f"{', '.join(sorted(tiktoken.list_encoding_names()))}"
        )
    # tiktoken has no offline switch: read_file, behind its cache, is what opens a connection.
    with mock.patch.object(tiktoken.load, "read_file", side_effect=_NotOnThisMachine):
        try:
            encoding = tiktoken.get_encoding(which)
        except _NotOnThisMachine:
            raise UserError(
                f"tokenizer {name!r}: its vocabulary is not in tiktoken's cache; fetch it once "
                f"with: python -c \"import tiktoken; tiktoken.get_encoding('{which}')\""
            ) from None
    try:
        eod = encoding.eot_token
    except KeyError:
        raise _no_end(name) from None
    return TiktokenTokenizer(name=name, vocab_size=encoding.n_vocab, eod=eod, encoding=encoding)


def _load_hugging_face(name: str, which: str) -> Tokenizer:
    try:
        import transformers
    except ImportError as error:
        raise _not_installed(name, "transformers", error) from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(which, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"tokenizer {name!r} is neither a tokenizer's folder nor in the local cache "
            f"({reason}); fetch it once with: hf download {which}"
        ) from None
    if tokenizer.eos_token_id is None:
        raise _no_end(name)
    # Added tokens may leave gaps, so the number of tokens can be below the largest id.
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    return HuggingFaceTokenizer(
        name=name, vocab_size=vocab_size, eod=tokenizer.eos_token_id, tokenizer=tokenizer
    )


def _not_installed(name: str, package: str, error: ImportError) -> UserError:
    return UserError(
        f"tokenizer {name!r} needs {package} ({error}); install it with: pip install {package}"
    )


def _no_end(name: str) -> UserError:
    return UserError(
        f"tokenizer {name!r} has no end-of-text token, which separates documents; use another"
    )
