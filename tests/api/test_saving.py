"""Folders that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.errors import InputError
from headrace.saving import check_new_folder, written_whole


def test_the_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with written_whole(out) as folder:
        assert not out.exists() and folder.parent == out.parent
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("x")
    assert (out / "inner" / "a").read_text() == "x"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_nothing_is_left_of_a_failure(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), written_whole(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    check_new_folder(tmp_path / "out")
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(InputError, match="holds files already"):
        check_new_folder(tmp_path / "out")
    with pytest.raises(OSError), written_whole(tmp_path / "out") as folder:
        (folder / "new").write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_places_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for bad in ("file", "dangling"):
        with pytest.raises(InputError, match="is not a folder"):
            check_new_folder(tmp_path / bad)
    with pytest.raises(InputError, match="cannot be written to"):
        check_new_folder(tmp_path / "file" / "below")
    check_new_folder(tmp_path / "not" / "yet" / "there")
    assert not (tmp_path / "not").exists()
