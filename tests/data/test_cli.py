"""``mhc-megatron data``: what it prints, and that its help needs no torch."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from mhc_megatron.data import cli
from mhc_megatron.data.sidecar import sidecar_path
from mhc_megatron.errors import UserError


def data(*words: str | Path) -> int:
    parser = argparse.ArgumentParser(prog="mhc-megatron data")
    cli.add_arguments(parser)
    return cli.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def prefix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    (tmp_path / "a.jsonl").write_text('{"body": "hello"}\n{"body": ""}\n{"body": "hi"}\n')
    out = tmp_path / "corpus"
    assert data("prepare", tmp_path / "a.jsonl", "--jsonl-key", "body", "--out", out) == 0
    return out


def test_prepare(prefix: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "1 empty documents passed over" in capsys.readouterr().out
    (tmp_path / "b.txt").write_text("x" * 2000)
    assert data("prepare", tmp_path / "b.txt", "--out", prefix) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        f"wrote {prefix}.bin, {prefix}.idx and {prefix}.json",
        "1 documents, 2,001 tokens from 2,000 bytes of text",
        "tokenizer byte, vocabulary 257",
    ]
    assert captured.err == ""  # no progress bar where there is no terminal


def test_inspect(prefix: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    capsys.readouterr()
    assert data("inspect", prefix) == 0
    assert capsys.readouterr().out.splitlines() == [
        "documents:        2",
        "tokens:           9 (uint16)",
        "largest token id: 256",
        "longest document: 6 tokens (document 0)",
        "tokenizer:        byte",
        "vocabulary:       257",
        "text:             7 bytes",
        f"source:           {tmp_path / 'a.jsonl'}",
        "checksum:         matches",
        "begins:           'hello'",
    ]


def test_inspect_data_of_another_tool(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sidecar_path(str(prefix)).unlink()
    capsys.readouterr()
    assert data("inspect", prefix) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "tokenizer:        unknown (no .json: prepared by another tool)",
        "begins:           token ids [104, 101, 108, 108, 111, 256]",
    ]


def test_inspect_finds_changed_ids(prefix: Path) -> None:
    path = Path(f"{prefix}.bin")
    content = path.read_bytes()
    path.write_bytes(b"j" + content[1:])
    with pytest.raises(UserError, match=r"corpus\.bin has changed since it was prepared"):
        data("inspect", prefix)


def test_errors_are_one_line(tmp_path: Path) -> None:
    commands: list[list[str | Path]] = [
        ["inspect", tmp_path / "nothing"],
        ["prepare", tmp_path / "nothing.txt", "--out", tmp_path / "out"],
        ["prepare", tmp_path, "--out", tmp_path / "out", "--tokenizer", "none"],
    ]
    for words in commands:
        with pytest.raises(UserError) as error:
            data(*words)
        assert "\n" not in str(error.value)


def test_help_needs_no_torch() -> None:
    code = (
        "import argparse, sys; sys.modules['torch'] = sys.modules['megatron'] = None; "
        "from mhc_megatron.data import cli; parser = argparse.ArgumentParser(prog='data'); "
        "cli.add_arguments(parser); parser.parse_args(['prepare', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--jsonl-key KEY" in done.stdout and "byte (default" in done.stdout
