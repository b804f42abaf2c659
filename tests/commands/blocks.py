"""The commands of README and docs: every line of every ``sh`` block."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.project import ROOT

BLOCK = re.compile(r"(?:<!-- step: [^\n]* -->\n)?^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@dataclass(frozen=True)
class DocCommand:
    """One command.

    Attributes:
        page: where it stands, from the root.
        line: of the page.
        text: without comment, on one line.
    """

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def doc_commands() -> list[DocCommand]:
    """Return every command, page by page; a comment ends it, a backslash goes on."""
    found = []
    for page in PAGES:
        content = page.read_text(encoding="utf-8")
        for block in BLOCK.finditer(content):
            first = content[: block.start(1)].count("\n") + 1
            text = ""
            for number, line in enumerate(block[1].splitlines(), first):
                text += re.sub(r"(^|\s)#.*", "", line).strip()
                if text.endswith("\\"):
                    text = text.removesuffix("\\").strip() + " "
                elif text:
                    found.append(DocCommand(str(page.relative_to(ROOT)), number, text))
                    text = ""
    return found
