"""Public text: what the interpreter ships, or the server's own file, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedsplit.errors import ConfigError
from fedsplit.privacy import public_text
from fedsplit.privacy.public_text import public_texts


def test_help_topics_are_there_without_docstrings():
    texts = public_texts(docstrings=False)

    assert len(texts) > 1000
    assert all(text == " ".join(text.split()) != "" for text in texts)


def test_a_file_is_read_line_by_line(tmp_path: Path):
    path = tmp_path / "public.txt"
    path.write_text("one text\n\n  another  \n", encoding="utf-8")

    assert public_texts(str(path)) == ["one text", "another"]


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe\xff"])
def test_files_that_are_none_are_refused(tmp_path: Path, content: bytes | None):
    path = tmp_path / "public.txt"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ConfigError, match=r"privacy\.public-text=.*must (be a readable|hold)"):
        public_texts(str(path))


def test_files_and_folders_are_read_in_order(tmp_path: Path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "b.txt").write_text("two\nthree\n", encoding="utf-8")
    (tmp_path / "some" / "a.txt").write_text("one\n", encoding="utf-8")
    (tmp_path / "some" / "notes.md").write_text("not text\n", encoding="utf-8")
    (tmp_path / "more").write_text("four\n", encoding="utf-8")

    paths = os.pathsep.join([str(tmp_path / "some"), str(tmp_path / "more")])

    assert public_texts(paths) == ["one", "two", "three", "four"]


def test_all_files_together_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x" * 60 + "\n", encoding="utf-8")
    monkeypatch.setattr(public_text, "MAX_BYTES", 100)

    with pytest.raises(ConfigError, match=r"b\.txt.*must be <= 100 bytes"):
        public_texts(str(tmp_path))


def test_a_folder_without_text_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"at least one \.txt file"):
        public_texts(str(tmp_path))
