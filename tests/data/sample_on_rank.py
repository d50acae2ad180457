"""One rank of ``test_distributed.py``: builds the datasets over gloo and prints what it samples.

Arguments: rank, number of ranks, rendezvous file, train prefix, validation prefix, cache folder.
"""

import json
import sys

import torch

from mhc_megatron.data.dataset import batch, build_datasets
from mhc_megatron.data.tokenizer import load_tokenizer


def main() -> None:
    rank, world_size, store, train_prefix, valid_prefix, cache = sys.argv[1:]
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world_size)
    )
    train, valid = build_datasets(
        train_prefix,
        valid_prefix,
        seq_length=16,
        train_samples=50,
        valid_samples=4,
        seed=3,
        tokenizer=load_tokenizer("byte"),
        cache_dir=cache,
    )
    print(json.dumps([batch(split, range(4))["tokens"].tolist() for split in (train, valid)]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
