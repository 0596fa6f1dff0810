"""Atomic replacement of files and folders, so that a crash leaves them whole."""

import stat
from pathlib import Path

import pytest

from lori.store.files import new_folder, remove_folder, replace_file


def test_a_file_is_replaced_whole_and_readable_for_all(tmp_path: Path) -> None:
    for content in (b"long, and the first", b"short"):
        replace_file(tmp_path / "a", content)
        assert (tmp_path / "a").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


def test_a_file_that_cannot_be_put_in_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="directory"):
        replace_file(tmp_path / "a", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_whose_block_raises_is_not_created(tmp_path: Path) -> None:
    def make() -> None:
        with new_folder(tmp_path / "a") as scratch:
            (scratch / "x").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        make()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_removed_with_all_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "x").write_text("x")
    remove_folder(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_cannot_be_removed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        remove_folder(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []
