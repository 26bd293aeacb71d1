"""Whole writes, and errors that say what was wrong."""

from __future__ import annotations

import os
import pathlib

import pytest

from trainer.core.errors import DataError
from trainer.io import files


def test_a_write_is_whole_or_not_at_all(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a/b"
    files.write(str(path), b"old", "a test")

    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, broken)
            with pytest.raises(DataError, match=rf"cannot write a test {path}: No space left on device"):
                files.write(str(path), b"new", "a test")
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path / "a") == ["b"], "a temporary file stayed behind"
    files.write(str(path), b"new", "a test")
    assert path.read_bytes() == b"new"


def test_a_write_is_on_the_platter_before_it_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (order.append(name), real(*a))[1])
    files.write(str(tmp_path / "x"), b"1", "a test")
    assert order == ["fsync", "replace", "fsync"]  # the content, the name, the folder


def test_names_reads_and_removals(tmp_path: pathlib.Path) -> None:
    assert files.names(str(tmp_path / "nowhere")) == []
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_text("1")
    assert files.names(str(tmp_path)) == ["a", "b"]
    files.remove(str(tmp_path / "a"))
    files.remove(str(tmp_path / "a"))
    with pytest.raises(DataError, match=rf"cannot read a test {tmp_path}/a"):
        files.read(str(tmp_path / "a"), "a test")


def test_join_keeps_the_slashes_of_a_bucket() -> None:
    assert files.join("gs://b", "x", "y") == "gs://b/x/y"
    assert files.join("gs://b/x/", "y") == "gs://b/x/y"
    assert files.is_remote("gs://b/x")
    assert not files.is_remote("/b/x")


def test_probe_leaves_nothing(tmp_path: pathlib.Path) -> None:
    files.require_writable(str(tmp_path / "new"), "--workdir")
    assert os.listdir(tmp_path / "new") == []
