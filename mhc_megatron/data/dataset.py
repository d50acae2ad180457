"""Training and validation samples: Megatron's ``GPTDataset`` over checked splits.

Sampling contract: step ``t`` uses the samples ``t * global_batch_size + j``, ``0 <= j <
global_batch_size``. A sample depends on its index, the data, the seed and the number of samples
asked for, and on nothing else: not on the data-parallel size, and not on where a run was resumed.
"""

import hashlib
import importlib
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import megatron.core
import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import get_bin_path, get_idx_path
from megatron.core.datasets.utils import Split
from torch import Tensor

from mhc_megatron.data.indexed import find_beyond, num_tokens, open_indexed
from mhc_megatron.data.sidecar import read_sidecar, sha256_of, sidecar_path
from mhc_megatron.data.tokenizer import Tokenizer
from mhc_megatron.errors import UserError


def check_split(prefix: str, *, vocab_size: int, seq_length: int) -> None:
    """Check a split before any model is built. Reads every token id once.

    Args:
        prefix: path of the split without ``.bin``/``.idx``.
        vocab_size: the model's; every id must be below it.
        seq_length: tokens per sample; the split needs one more, the last label.

    Raises:
        UserError: missing, empty, truncated or mismatched files, an id beyond the vocabulary (with
            its position), or too few tokens.
    """
    dataset = open_indexed(prefix)
    tokens = num_tokens(dataset)
    remedy = "use a larger vocabulary or prepare the data with this model's tokenizer"
    sidecar = read_sidecar(prefix)
    if sidecar is not None:
        if sidecar.tokens != tokens:
            raise UserError(
                f"{prefix}.bin holds {tokens} tokens but {sidecar_path(prefix)} says "
                f"{sidecar.tokens}; prepare it again"
            )
        remedy = f"the data was prepared with tokenizer {sidecar.tokenizer!r}; {remedy}"
        if sidecar.vocab_size > vocab_size:
            raise UserError(
                f"{prefix} has a vocabulary of {sidecar.vocab_size} but the model's is "
                f"{vocab_size}: {remedy}"
            )
    beyond = find_beyond(prefix, dataset, vocab_size=vocab_size)
    if beyond is not None:
        token, position = beyond
        raise UserError(
            f"{get_bin_path(prefix)}: token id {token} at position {position} is outside the "
            f"vocabulary of {vocab_size}: {remedy}"
        )
    if tokens < seq_length + 1:
        raise UserError(
            f"{prefix} has {tokens} tokens; seq_length={seq_length} needs {seq_length + 1} or "
            "more: prepare more text or lower seq_length"
        )


def build_datasets(
    train_prefix: str,
    valid_prefix: str,
    *,
    seq_length: int,
    train_samples: int,
    valid_samples: int,
    seed: int,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
) -> tuple[GPTDataset, GPTDataset]:
    """Build the sample indices of both splits and open them, memory-mapped.

    Collective where torch.distributed is initialised: rank 0 builds the indices in ``cache_dir``,
    which all ranks must see; the others wait in the barrier of Megatron's builder. A cache entry
    is published whole, and its key contains the checksum of the ``.idx``, so that data prepared
    anew is never sampled with an old index.

    Args:
        train_prefix, valid_prefix: splits that ``check_split`` accepts.
        seq_length: tokens per sample.
        train_samples, valid_samples: samples each dataset has at least; beyond one epoch the split
            repeats in another order. Part of the order: resume with the same numbers.
        seed: of Megatron's shuffling of documents and samples.
        tokenizer: gives ``eod`` and the vocabulary.
        cache_dir: folder of the sample indices.

    Returns:
        The train and the validation dataset.

    Raises:
        UserError: ``cache_dir`` cannot be written, or megatron-core's compiled dataset helper is
            missing for this Python.
    """
    _require_compiled_helper()
    plan = {Split.train: (train_prefix, train_samples), Split.valid: (valid_prefix, valid_samples)}

    def config(cache: Path) -> GPTDatasetConfig:
        return GPTDatasetConfig(
            random_seed=seed,
            sequence_length=seq_length,
            blend_per_split=[([train_prefix], None), ([valid_prefix], None), None],
            path_to_cache=str(cache),
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )

    entry = Path(cache_dir) / _cache_key(plan, seq_length, seed, tokenizer)
    if _rank() == 0 and not entry.is_dir():
        try:
            _fill_cache(entry, plan, config)
        except OSError as error:
            raise UserError(
                f"cannot write the sample index in {cache_dir}: {error.strerror}; "
                "choose a folder that can be written"
            ) from None
    train, valid, _ = BlendedMegatronDatasetBuilder(
        GPTDataset, [train_samples, valid_samples, None], lambda: True, config(entry)
    ).build()
    return train, valid


def micro_batch_indices(
    step: int,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
) -> list[range]:
    """Sample indices of each micro-batch of one step on one data-parallel rank.

    The ranks take turns, a micro-batch each, as in Megatron's samplers; over all ranks a step has
    ``step * global_batch_size`` to ``(step + 1) * global_batch_size - 1``, each once.
    """
    per_turn = micro_batch_size * data_size
    assert global_batch_size % per_turn == 0 and 0 <= data_rank < data_size
    start = step * global_batch_size
    first = start + data_rank * micro_batch_size
    return [
        range(index, index + micro_batch_size)
        for index in range(first, start + global_batch_size, per_turn)
    ]


def batch(dataset: GPTDataset, sample_indices: Iterable[int]) -> dict[str, Tensor]:
    """Stack samples into one micro-batch.

    Returns:
        ``tokens``, ``labels`` (the next tokens) and ``position_ids``, int64 [b, s]; ``loss_mask``,
        float32 [b, s]. On the CPU, and owned by the caller.
    """
    samples = [dataset[index] for index in sample_indices]
    keys = ("tokens", "labels", "loss_mask", "position_ids")
    return {key: torch.stack([sample[key] for sample in samples]) for key in keys}


def _rank() -> int:
    distributed = torch.distributed
    initialized = distributed.is_available() and distributed.is_initialized()
    return distributed.get_rank() if initialized else 0


def _require_compiled_helper() -> None:
    try:
        importlib.import_module("megatron.core.datasets.helpers")
    except ImportError as error:
        raise UserError(
            f"megatron-core {megatron.core.__version__} lacks its compiled dataset helper for this "
            f"Python ({error}); install the wheel of this Python version, or build "
            "megatron/core/datasets/helpers.cpp with pybind11"
        ) from None


def _cache_key(
    plan: dict[Split, tuple[str, int]], seq_length: int, seed: int, tokenizer: Tokenizer
) -> str:
    """Everything that the sample indices, and Megatron's names for their files, depend on.

    Of the data that is the lengths of the documents, which are in the ``.idx``.
    """
    splits = [
        (prefix, size, sha256_of(Path(get_idx_path(prefix)))) for prefix, size in plan.values()
    ]
    parts = [megatron.core.__version__, splits, seq_length, seed, tokenizer.unique_identifiers]
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()[:32]


def _fill_cache(
    entry: Path,
    plan: dict[Split, tuple[str, int]],
    config: Callable[[Path], GPTDatasetConfig],
) -> None:
    """Build the indices of both splits under another name, then rename: whole or absent."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".building-") as folder:
        building = Path(folder) / entry.name
        settings = config(building)
        for split, (prefix, num_samples) in plan.items():
            indexed = GPTDataset.build_low_level_dataset(prefix, settings)
            documents = numpy.arange(GPTDataset.numel_low_level_dataset(indexed), dtype=numpy.int32)
            GPTDataset(indexed, prefix, documents, num_samples, split, settings)
        try:
            building.rename(entry)
        except OSError:
            if not entry.is_dir():  # otherwise another run has published the same entry
                raise
