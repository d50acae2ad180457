"""Distributed checkpoints as state dicts: every tensor of the model, whatever layout saved it."""

import dataclasses
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from helpers import training
from helpers.pool import WorkerPool
from torch.distributed import checkpoint

from mhc_megatron.config import MHCConfig
from mhc_megatron.convert.distributed import read_distributed
from mhc_megatron.convert.names import convert_names
from mhc_megatron.errors import UserError
from mhc_megatron.launch import cli
from mhc_megatron.training.config import DataConfig, ModelConfig, ParallelConfig, TrainConfig


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_a_checkpoint_of_ours_is_read_and_translated(
    workers: WorkerPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, valid = training.corpus(tmp_path)
    config = TrainConfig(
        model=ModelConfig(
            num_layers=4, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, seq_length=32
        ),
        mhc=MHCConfig(num_streams=3, contraction="learned"),
        data=DataConfig(train=train, valid=valid),
        parallel=ParallelConfig(pipeline=2, schedule="dualpipe_v", distributed_optimizer=True),
        steps=2,
        micro_batch_size=1,
        global_batch_size=4,
        out=str(tmp_path / "run"),
    )
    workers.run(training.train_steps, 2, config, 1, True)
    one = dataclasses.replace(config, parallel=ParallelConfig(distributed_optimizer=True))
    [model] = workers.run(training.saved_model, 1, one)
    source = tmp_path / "run" / "checkpoints" / "step_00000001"
    assert equal(read_distributed(source, "ours"), model)

    v4 = tmp_path / "v4.pt"
    words = ["convert", "names", str(source), "--from", "ours", "--to", "deepseek_v4"]
    assert cli.main([*words, "--only-hyper-connections", "--out", str(v4)]) == 0
    assert "27 entries from the 43 of" in capsys.readouterr().out
    expected = convert_names(model, "ours", "deepseek_v4", only_hyper_connections=True)
    assert equal(torch.load(v4), expected)

    damaged = tmp_path / "step_00000002"
    shutil.copytree(source, damaged)
    shard = damaged / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"step_00000002 is damaged: __0_0\.distcp has other"):
        read_distributed(damaged, "ours")
    with pytest.raises(UserError, match=r"run is no checkpoint, but holds some; .*step_00000001$"):
        read_distributed(tmp_path / "run", "ours")
    with pytest.raises(UserError, match="DeepSeek-V4's names are read from state dicts"):
        read_distributed(source, "deepseek_v4")


@pytest.mark.one_core
def test_layers_have_numbers_and_experts_no_known_names(tmp_path: Path) -> None:
    """As Megatron saves layers that are not alike, and alike."""
    bias = "self_attention_hyper_connection.bias"
    saved = {
        f"decoder.layers.0.{bias}": torch.arange(8.0),
        "mtp.layers.0.eh_proj.weight": torch.arange(2.0),
        f"encoder.layers.{bias}": torch.arange(16.0).view(2, 8),
        "optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(1),
        "chained_0.optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(1),
        "decoder.final_layernorm.weight": torch.ones(1),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save(saved, checkpoint_id=tmp_path / "iter_0000001")
        experts = {"decoder.layers.mlp.experts.experts.linear_fc1.weight": torch.zeros(1, 2, 3, 4)}
        checkpoint.save(saved | experts, checkpoint_id=tmp_path / "iter_0000002")
    rows = {f"encoder.layers.{i}.{bias}": torch.arange(16.0).view(2, 8)[i] for i in range(2)}
    whole = dict(list(saved.items())[:2]) | rows
    whole |= {"decoder.final_layernorm.norm.weight": torch.ones(1)}
    assert equal(read_distributed(tmp_path / "iter_0000001", "ours"), whole)
    theirs = read_distributed(tmp_path / "iter_0000001", "megatron")
    assert "decoder.final_layernorm.weight" in theirs

    with pytest.raises(UserError, match=r"experts\.linear_fc1\.weight of .* ask for the hyper-c"):
        read_distributed(tmp_path / "iter_0000002", "megatron")
    only = read_distributed(tmp_path / "iter_0000002", "megatron", only_hyper_connections=True)
    assert only.keys() == {f"decoder.layers.0.{bias}"}
    with pytest.raises(UserError, match=r"such as .*iter_0000002$"):
        read_distributed(tmp_path, "ours")
    with pytest.raises(UserError, match=r"is not a distributed checkpoint \(\.metadata is missing"):
        read_distributed(tmp_path / "nowhere", "ours")
