"""Two gloo ranks build one index and sample as a single process does."""

from pathlib import Path

import torch
from helpers.pool import WorkerPool

from mhc_megatron.data.dataset import batch, build_datasets
from mhc_megatron.data.prepare import prepare
from mhc_megatron.data.tokenizer import load_tokenizer

WORLD_SIZE = 2


def first_samples(prefixes: list[str], cache: Path) -> list[list[list[int]]]:
    """Tokens of the first four samples of either split."""
    splits = build_datasets(
        prefixes[0],
        prefixes[1],
        seq_length=16,
        train_samples=50,
        valid_samples=4,
        seed=3,
        tokenizer=load_tokenizer("byte"),
        cache_dir=cache,
    )
    return [batch(split, range(4))["tokens"].tolist() for split in splits]


def on_rank(rank: int, world_size: int, prefixes: list[str], cache: Path) -> list[list[list[int]]]:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        return first_samples(prefixes, cache)
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_agree_with_a_single_process(workers: WorkerPool, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} bottles\n" for number in range(40)))
    prefixes = [str(tmp_path / "train"), str(tmp_path / "valid")]
    for prefix in prefixes:
        prepare([text], prefix, tokenizer=load_tokenizer("byte"))

    found = workers.run(on_rank, WORLD_SIZE, prefixes, tmp_path / "cache")
    assert found == [first_samples(prefixes, tmp_path / "own cache")] * WORLD_SIZE
    assert len(list((tmp_path / "cache").iterdir())) == 1
