"""Writing files whole; that a failure changes nothing is in `bad_input/test_saving.py`."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from multigraft.atomic import write_files, write_text


def test_text_is_written_in_utf8_whatever_the_locale(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", '{"name": "äß→"}\n')
    assert (tmp_path / "a.json").read_bytes() == '{"name": "äß→"}\n'.encode()


def test_files_go_into_several_folders_that_are_made(tmp_path: Path) -> None:
    targets = [tmp_path / "a" / "one", tmp_path / "a" / "b" / "two", tmp_path / "three"]
    write_files({t: lambda p, t=t: p.write_text(t.name) for t in targets})  # type: ignore[misc]
    assert [t.read_text() for t in targets] == ["one", "two", "three"]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "one", "three", "two"]


def test_nothing_is_in_place_before_everything_is_written(tmp_path: Path) -> None:
    (tmp_path / "first").write_text("old")
    seen = []

    def second(path: Path) -> None:
        seen.append((tmp_path / "first").read_text())
        path.write_text("new")

    write_files({tmp_path / "first": lambda p: p.write_text("new"), tmp_path / "second": second})
    assert seen == ["old"]
    assert (tmp_path / "first").read_text() == "new"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_new_files_have_the_mode_that_the_user_wants(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_a_reader_that_has_the_old_file_open_goes_on_reading_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with open(tmp_path / "a") as reader:
        write_text(tmp_path / "a", "new")
        assert reader.read() == "old"


def test_a_link_is_replaced_and_what_it_means_stays(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "real").read_text() == "real"
    assert (tmp_path / "link").read_text() == "new"
