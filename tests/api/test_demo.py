"""The demo's material is made once, also by two that make it at the same time."""

from __future__ import annotations

import errno
import importlib.metadata
from pathlib import Path

import pytest

from headrace import demo
from headrace.progress import Silent


def test_the_first_to_finish_gives_its_model_to_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Path] = []

    def dequantise(gguf: Path, folder: Path) -> None:
        first = not found
        found.append(folder)
        if first:  # another begins and ends while this one is at work
            found.append(demo.demo_model(Silent(), cache=tmp_path))
        (folder / "made-by").write_text("the late one" if first else "the early one")

    monkeypatch.setattr(demo, "_find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(demo, "_dequantise", dequantise)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1")
    folder = demo.demo_model(Silent(), cache=tmp_path)
    late, early, result = found
    assert late != early and result == folder
    assert (folder / "made-by").read_text() == "the early one"
    assert list(tmp_path.iterdir()) == [folder]


def test_other_failures_are_not_taken_for_a_finished_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(gguf: Path, folder: Path) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(demo, "_find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(demo, "_dequantise", full)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1")
    with pytest.raises(OSError, match="no space left"):
        demo.demo_model(Silent(), cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_text_is_whole(tmp_path: Path) -> None:
    path = demo.demo_data(cache=tmp_path)
    assert demo.demo_data(cache=tmp_path) == path
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) > 50 and all(line.startswith('{"text":') for line in lines)
