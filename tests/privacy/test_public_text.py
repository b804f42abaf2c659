"""Public text: what the interpreter ships, or the server's own file, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsplit.errors import ConfigError
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
