"""The embedded corpus: the same files in the same order, each in one split."""

from pathlib import Path

import pytest

from mhc_megatron.data import corpus
from mhc_megatron.errors import UserError


def test_splits_are_disjoint_and_cover_every_file() -> None:
    names = corpus.list_files()
    assert names == sorted(set(names))
    by_split = {"train": 0, "valid": 0}
    for name in names:
        by_split[corpus.split_of(name)] += 1
    assert sum(by_split.values()) == len(names)
    assert 0.03 < by_split["valid"] / len(names) < 0.07  # 5 %, give or take chance


def test_split_depends_on_the_relative_path_only() -> None:
    # Written out: a change of the hash would move validation text into training.
    in_valid = [name for name in ("argparse.py", "ast.py", "turtle.py") if _is_valid(name)]
    assert in_valid == ["turtle.py"]


def _is_valid(name: str) -> bool:
    return corpus.split_of(name) == "valid"


def test_running_python_has_both_splits() -> None:
    train = sum(document.num_bytes for document in corpus.iter_documents("train"))
    valid = sum(document.num_bytes for document in corpus.iter_documents("valid"))
    assert train > 1_000_000 and valid > 50_000


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for name in ("a.py", "json/b.py", "notes.txt"):
        _write(tmp_path / name, f"# {name}\n")
    for name in (
        "test/x.py",
        "json/tests/x.py",
        "site-packages/x.py",
        "__pycache__/x.py",
        "config-3.12-x86_64-linux-gnu/python-config.py",
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
    ):
        _write(tmp_path / name, "left out")
    return tmp_path


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_what_belongs(library: Path) -> None:
    assert corpus.list_files(root=library) == ["a.py", "json/b.py"]
    documents = [*corpus.iter_documents("train", root=library)]
    documents += corpus.iter_documents("valid", root=library)
    assert sorted(document.text for document in documents) == ["# a.py\n", "# json/b.py\n"]


def test_fingerprint_follows_paths_and_contents(library: Path) -> None:
    before = corpus.fingerprint(root=library)
    assert corpus.fingerprint(root=library) == before
    _write(library / "a.py", "# changed")
    changed = corpus.fingerprint(root=library)
    (library / "a.py").rename(library / "c.py")
    assert len({before, changed, corpus.fingerprint(root=library)}) == 3


def test_no_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no Python sources.*data prepare"):
        corpus.list_files(root=tmp_path)
