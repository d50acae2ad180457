"""Two gloo ranks build one index and sample as a single process does."""

import json
import subprocess
import sys
from pathlib import Path

from mhc_megatron.data.dataset import batch, build_datasets
from mhc_megatron.data.prepare import prepare
from mhc_megatron.data.tokenizer import load_tokenizer

WORLD_SIZE = 2


def test_ranks_agree_with_a_single_process(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} bottles\n" for number in range(40)))
    prefixes = [str(tmp_path / "train"), str(tmp_path / "valid")]
    for prefix in prefixes:
        prepare([text], prefix, tokenizer=load_tokenizer("byte"))

    shared = [str(WORLD_SIZE), str(tmp_path / "store"), *prefixes, str(tmp_path / "cache")]
    script = str(Path(__file__).with_name("sample_on_rank.py"))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", script, str(rank), *shared],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD_SIZE)
    ]
    printed = [process.communicate(timeout=60) for process in ranks]
    assert [process.returncode for process in ranks] == [0] * WORLD_SIZE, printed

    datasets = build_datasets(
        prefixes[0],
        prefixes[1],
        seq_length=16,
        train_samples=50,
        valid_samples=4,
        seed=3,
        tokenizer=load_tokenizer("byte"),
        cache_dir=tmp_path / "own cache",
    )
    alone = [batch(split, range(4))["tokens"].tolist() for split in datasets]
    assert [json.loads(out) for out, _ in printed] == [alone] * WORLD_SIZE
    assert len(list((tmp_path / "cache").iterdir())) == 1
