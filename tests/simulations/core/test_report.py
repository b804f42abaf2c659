"""The page of a run: complete, self-contained, and nothing in it is taken for markup."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedsplit.errors import RunError
from simulations.core.report import write_report
from simulations.core.run_folder import RunFolder

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8cfc0"
    "000003010100c9fe92ef0000000049454e44ae426082"
)


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [v or "" for k, v in attrs if k in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def read(folder: Path) -> Reader:
    reader = Reader()
    reader.feed(write_report(folder).read_text())
    return reader


def test_the_page_has_everything_and_loads_nothing(tmp_path: Path) -> None:
    with RunFolder(tmp_path, name="x", kind="table") as folder:
        folder.write_config({"seed": 3})
        folder.record(
            about="<script>alert(1)</script>",
            rows=[{"eta": 8.0, "accuracy": 0.7312345}, {"eta": 9.0, "error": "a<b"}] * 20,
            summary=[{"variant": "plain", "accuracy": 0.5, "per_layer": list(range(20))}],
            broken=2,
        )
        (tmp_path / "frontier.png").write_bytes(PIXEL)
    page = read(tmp_path)
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    assert "0.7312" in page.text
    assert "a<b" in page.text
    assert "seed = 3" in page.text
    assert page.sources
    assert all(s.startswith("data:image/png;base64,") for s in page.sources)


def test_an_interrupted_run_has_a_page_too(tmp_path: Path) -> None:
    def interrupted() -> None:
        with RunFolder(tmp_path, name="x", kind="table") as folder:
            folder.record(rows=[{"a": 1}])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "interrupted" in read(tmp_path).text
    with pytest.raises(RunError):
        write_report(tmp_path / "nothing")
