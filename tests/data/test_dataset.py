"""Sampling against its contract, and every fault of a split named before training."""

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from mhc_megatron.data import dataset as dataset_module
from mhc_megatron.data import indexed
from mhc_megatron.data.dataset import batch, build_datasets, check_split, micro_batch_indices
from mhc_megatron.data.prepare import prepare
from mhc_megatron.data.tokenizer import Tokenizer
from mhc_megatron.errors import UserError

SEQ = 32


def build(splits: tuple[str, str], tokenizer: Tokenizer, cache: Path, **changes: Any) -> tuple:
    options = {"seq_length": SEQ, "train_samples": 40, "valid_samples": 6, "seed": 7} | changes
    return build_datasets(*splits, **options, tokenizer=tokenizer, cache_dir=cache)


def tokens_of(dataset: Any, num_samples: int = 40) -> list[list[int]]:
    return batch(dataset, range(num_samples))["tokens"].tolist()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_samples_are_windows_of_the_split(
    splits: tuple[str, str], number_tokenizer: Tokenizer, cache: Path
) -> None:
    _, valid = build(splits, number_tokenizer, cache)
    document = [*range(500, 700), 999]
    # One document of 201 tokens holds 6 windows of 32 and their labels; 6 were asked for.
    windows = [document[i : i + SEQ + 1] for i in range(0, 6 * SEQ, SEQ)]
    got = batch(valid, range(6))
    pairs = zip(got["tokens"].tolist(), got["labels"].tolist(), strict=True)
    assert sorted([*tokens, labels[-1]] for tokens, labels in pairs) == windows


def test_batch(splits: tuple[str, str], number_tokenizer: Tokenizer, cache: Path) -> None:
    train, _ = build(splits, number_tokenizer, cache)
    got = batch(train, [3, 0, 39])
    assert {name: tensor.dtype for name, tensor in got.items()} == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "loss_mask": torch.float32,
        "position_ids": torch.int64,
    }
    assert all(tensor.shape == (3, SEQ) for tensor in got.values())
    assert torch.equal(got["labels"][:, :-1], got["tokens"][:, 1:])
    assert torch.equal(got["position_ids"], torch.arange(SEQ).expand(3, SEQ))
    assert torch.equal(got["loss_mask"], torch.ones(3, SEQ))
    again = batch(train, [39])["tokens"]
    got["tokens"].zero_()
    assert torch.equal(batch(train, [39])["tokens"], again)


def test_epochs_repeat_the_split(
    splits: tuple[str, str], number_tokenizer: Tokenizer, cache: Path
) -> None:
    train, _ = build(splits, number_tokenizer, cache)
    # 505 tokens an epoch: 40 samples of 32 take three epochs.
    seen, counts = numpy.unique(tokens_of(train), return_counts=True)
    assert set(seen) <= {*range(500), 999}
    assert len(train) >= 40 and counts[:-1].max() == 3


def test_same_seed_same_samples(
    splits: tuple[str, str], number_tokenizer: Tokenizer, cache: Path, tmp_path: Path
) -> None:
    first = tokens_of(build(splits, number_tokenizer, cache)[0])
    cached = tokens_of(build(splits, number_tokenizer, cache)[0])
    rebuilt = tokens_of(build(splits, number_tokenizer, tmp_path / "elsewhere")[0])
    other_seed = tokens_of(build(splits, number_tokenizer, cache, seed=8)[0])
    assert first == cached == rebuilt
    assert first != other_seed


@pytest.mark.parametrize("data_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_data_parallel_size_does_not_change_a_step(data_size: int, micro_batch_size: int) -> None:
    for step in (0, 1, 5):
        ranks = [
            micro_batch_indices(
                step,
                global_batch_size=8,
                micro_batch_size=micro_batch_size,
                data_rank=rank,
                data_size=data_size,
            )
            for rank in range(data_size)
        ]
        assert {len(micro_batches) for micro_batches in ranks} == {
            8 // micro_batch_size // data_size
        }
        # Turn by turn, and in a turn rank by rank, the indices run on without a gap.
        in_order = [i for turn in zip(*ranks, strict=True) for indices in turn for i in indices]
        assert in_order == list(range(step * 8, step * 8 + 8))


def test_prepared_anew_is_not_sampled_with_the_old_index(
    splits: tuple[str, str], number_tokenizer: Tokenizer, cache: Path, tmp_path: Path
) -> None:
    build(splits, number_tokenizer, cache)
    text = tmp_path / "shorter.txt"
    text.write_text(" ".join(["5"] * 50))
    prepare([text], splits[0], tokenizer=number_tokenizer)
    train, _ = build(splits, number_tokenizer, cache)
    assert numpy.unique(tokens_of(train)).tolist() == [5, 999]


def test_interrupted_index_is_built_again(
    splits: tuple[str, str],
    number_tokenizer: Tokenizer,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real_save, saved = numpy.save, []

    def stop_at_the_last(path: str, *args: Any, **kwargs: Any) -> None:
        saved.append(path)
        if len(saved) == 6:  # document, sample and shuffle index of both splits
            raise KeyboardInterrupt
        real_save(path, *args, **kwargs)

    monkeypatch.setattr(numpy, "save", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        build(splits, number_tokenizer, cache)
    assert list(cache.iterdir()) == []
    monkeypatch.undo()
    build(splits, number_tokenizer, cache)
    assert len(list(cache.iterdir())) == 1


def test_two_runs_may_publish_the_same_index(
    splits: tuple[str, str],
    number_tokenizer: Tokenizer,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real_rename = Path.rename

    def other_run_first(path: Path, target: Path) -> Path:
        monkeypatch.undo()
        other.append(tokens_of(build(splits, number_tokenizer, cache)[0]))
        return real_rename(path, target)

    other: list[list[list[int]]] = []
    monkeypatch.setattr(Path, "rename", other_run_first)
    assert [tokens_of(build(splits, number_tokenizer, cache)[0])] == other
    assert len(list(cache.iterdir())) == 1


def test_index_that_cannot_be_written(
    splits: tuple[str, str], number_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write the sample index in .*file"):
        build(splits, number_tokenizer, tmp_path / "file")


def test_missing_compiled_helper(
    splits: tuple[str, str],
    number_tokenizer: Tokenizer,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(name: str) -> None:
        raise ImportError("No module named 'helpers_cpp'")

    monkeypatch.setattr(dataset_module.importlib, "import_module", fail)
    with pytest.raises(UserError, match=r"lacks its compiled dataset helper.*pybind11"):
        build(splits, number_tokenizer, cache)


def check(prefix: str, *, vocab_size: int = 1000, seq_length: int = SEQ) -> None:
    check_split(prefix, vocab_size=vocab_size, seq_length=seq_length)


def test_good_splits_pass(splits: tuple[str, str]) -> None:
    for prefix in splits:
        check(prefix)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ([".bin"], r"^\S*train\.bin not found; write it with: mhc-megatron data prepare"),
        ([".idx"], r"^\S*train\.idx not found"),
        ([".bin", ".idx"], r"^\S*train\.bin and \S*train\.idx not found"),
    ],
)
def test_missing_files(removed: list[str], message: str, splits: tuple[str, str]) -> None:
    for ending in removed:
        Path(splits[0] + ending).unlink()
    with pytest.raises(UserError, match=message):
        check(splits[0])


def test_prefix_with_an_ending(splits: tuple[str, str]) -> None:
    with pytest.raises(UserError, match=r"give the prefix without its ending: \S*train$"):
        check(splits[0] + ".bin")


@pytest.mark.parametrize(
    ("ending", "size", "message"),
    [
        (".bin", -1, r"train\.bin has 1009 bytes but its index counts 1010: it is truncated"),
        (".bin", -100, "truncated"),
        (".bin", 0, r"train\.bin holds no tokens"),
        (".idx", -1, r"train\.idx has 141 bytes but its header counts 142: it is truncated"),
        (".idx", 20, "less than its header"),
        (".idx", 0, "less than its header"),
    ],
)
def test_truncated(ending: str, size: int, message: str, splits: tuple[str, str]) -> None:
    path = Path(splits[0] + ending)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=message):
        check(splits[0])


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"nonsense", "is not a Megatron index"),
        (17, b"\x07", "declares float32 values, not token ids"),
        (17, b"\x63", "is damaged"),
        (-8, struct.pack("<Q", 4), "is damaged"),
    ],
)
def test_damaged_index(offset: int, value: bytes, message: str, splits: tuple[str, str]) -> None:
    path = Path(splits[0] + ".idx")
    content = bytearray(path.read_bytes())
    offset %= len(content)
    content[offset : offset + len(value)] = value
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"train\.idx {message}"):
        check(splits[0])


def test_bin_of_another_corpus(splits: tuple[str, str]) -> None:
    Path(splits[1] + ".bin").replace(splits[0] + ".bin")
    with pytest.raises(UserError, match=r"belongs to another \.idx"):
        check(splits[0])


def write_ids(prefix: str, documents: list[list[int]], dtype: type = numpy.int32) -> str:
    """A split as another tool writes it: without a sidecar."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(numpy.array(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_no_documents(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.idx holds no documents"):
        check(write_ids(str(tmp_path / "a"), []))


@pytest.mark.parametrize("bad", [100, 2**31 - 1, -1])
@pytest.mark.parametrize("position", [0, 41, 79])
def test_id_outside_the_vocabulary(
    bad: int, position: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "_CHUNK", 7)  # positions count over chunks
    ids = [99] * 80
    ids[position] = bad
    ids[79] = bad  # the first is reported
    prefix = write_ids(str(tmp_path / "a"), [ids[:50], ids[50:]])
    message = rf"a\.bin: token id {bad} at position {position} is outside the vocabulary of 100"
    with pytest.raises(UserError, match=message):
        check(prefix, vocab_size=100)


def test_vocabulary_names_the_tokenizer(splits: tuple[str, str]) -> None:
    with pytest.raises(UserError, match=r"1000 but the model's is 257: .* tokenizer 'numbers'"):
        check(splits[0], vocab_size=257)


def test_sidecar_of_another_corpus(splits: tuple[str, str]) -> None:
    Path(splits[1] + ".json").replace(splits[0] + ".json")
    with pytest.raises(UserError, match=r"train\.bin holds 505 tokens but .* says 201"):
        check(splits[0])


def test_shorter_than_one_sample(splits: tuple[str, str]) -> None:
    check(splits[1], seq_length=200)
    with pytest.raises(UserError, match=r"has 201 tokens; seq_length=201 needs 202 or more"):
        check(splits[1], seq_length=201)


def test_larger_vocabulary_is_sampled_as_int32(
    tmp_path: Path, number_tokenizer: Tokenizer, cache: Path
) -> None:
    ids = [70_000 + i for i in range(100)]
    prefix = write_ids(str(tmp_path / "a"), [ids])
    tokenizer = replace(number_tokenizer, vocab_size=80_000)
    train, _ = build((prefix, prefix), tokenizer, cache, train_samples=3)
    assert sorted(tokens_of(train, 3)) == [ids[i : i + SEQ] for i in range(0, 96, SEQ)]
