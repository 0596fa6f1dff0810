"""File stamps: a rewritten file has another stamp, even with the same size and modification time."""

import os
from pathlib import Path

import pytest

from lori.store.aliases import Aliases
from lori.store.files import file_stamp


def wait_for_tick(file: Path) -> None:
    """Wait until the file system's clock is past the last change of `file`. Its ticks take milliseconds."""
    clock = file.with_name(".clock")
    while not clock.exists() or clock.stat().st_ctime_ns <= file.stat().st_ctime_ns:
        clock.write_text("")


def rewrite(file: Path, content: str, *, is_in_place: bool) -> None:
    """Replace the content with one of the same size, and restore the modification time."""
    before = file.stat()
    wait_for_tick(file)
    if is_in_place:
        file.write_text(content)
    else:
        other = file.with_name(f".{file.name}.new")
        other.write_text(content)
        os.replace(other, file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("is_in_place", [True, False])
def test_a_file_that_is_rewritten_at_equal_size_and_time_has_another_stamp(tmp_path: Path, is_in_place: bool) -> None:
    file = tmp_path / "file"
    file.write_text("one")
    stamp = file_stamp(file)
    assert stamp == file_stamp(file)
    rewrite(file, "two", is_in_place=is_in_place)
    assert file_stamp(file) != stamp


def test_a_link_has_the_stamp_of_its_target(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    link = tmp_path / "link"
    assert file_stamp(link) is None
    link.symlink_to("one")
    assert file_stamp(link) == file_stamp(tmp_path / "one")
    link.unlink()
    link.symlink_to("two")
    assert file_stamp(link) == file_stamp(tmp_path / "two") != file_stamp(tmp_path / "one")


@pytest.mark.parametrize("is_in_place", [True, False])
def test_an_alias_that_is_set_again_has_another_stamp(tmp_path: Path, is_in_place: bool) -> None:
    aliases = Aliases(tmp_path)
    assert aliases.stamp("math") is None
    aliases.set("math", "math@111111111111")
    stamp = aliases.stamp("math")
    rewrite(aliases.folder / "math", "math@222222222222\n", is_in_place=is_in_place)
    assert aliases.stamp("math") != stamp
