"""Reading text: order, and errors that name file and place."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhc_megatron.data.documents import find_files, read_documents
from mhc_megatron.errors import UserError


def texts(path: Path, key: str = "text") -> list[str]:
    return [document.text for document in read_documents(path, jsonl_key=key)]


def test_directory_is_sorted_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    for name in ("b.txt", "a/2.txt", "a/10.txt", ".hidden", ".git/config", "a/.x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "empty.txt").touch()
    named = tmp_path / ".hidden"
    found = find_files([named, tmp_path])
    inside = ["a/10.txt", "a/2.txt", "b.txt", "empty.txt"]
    assert found == [named, *(tmp_path / name for name in inside)]


def test_text_is_verbatim(tmp_path: Path) -> None:
    path = tmp_path / "windows.txt"
    path.write_bytes("één\r\ntwee\r\n\x00".encode())
    assert texts(path) == ["één\r\ntwee\r\n\x00"]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\n", "body": "1"}\n\n{"text": "", "body": "2"}')
    documents = list(read_documents(path, jsonl_key="text"))
    assert [document.text for document in documents] == ["one\n", ""]
    assert [document.num_bytes for document in documents] == [4, 0]
    assert texts(path, key="body") == ["1", "2"]


@given(lines=st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]))))
def test_json_lines_round_trip(lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), "utf-8")
    assert texts(path) == lines


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: invalid JSON at column"),
        (b'{"text": "a"}\n\n{"body": 1}\n', r"line 3: no key 'text'; the keys are: 'body'"),
        (b"{}\n", r"line 1: no key 'text'; the keys are: none"),
        (b'["text"]\n', r"line 1: a JSON list where an object"),
        (b'{"text": null}\n', r"line 1: the value of 'text' is NoneType, not text"),
        (b'{"text": "a\\ud800"}\n', r"line 1: .* half a surrogate pair at character 1"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl is not UTF-8 at byte 24 \(0xff: "),
    ],
)
def test_bad_json_lines(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        texts(path)
    assert "\n" not in str(error.value)


def test_bad_utf8_names_file_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 at byte 3 \(0xe9: "):
        texts(path)


def test_bad_inputs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt does not exist"):
        find_files([tmp_path / "nowhere.txt"])
    with pytest.raises(UserError, match="directory without files"):
        find_files([tmp_path])
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"empty\.txt is empty"):
        find_files([tmp_path / "empty.txt"])
    with pytest.raises(UserError, match="neither a file nor a directory"):
        find_files([Path("/dev/null")])


def test_file_that_vanishes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*gone\.txt: No such file"):
        texts(tmp_path / "gone.txt")
