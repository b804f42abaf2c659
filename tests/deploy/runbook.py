"""The runbook's commands, read out of docs/deploy.md so that tests run what readers are told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNBOOK = ROOT / "docs" / "deploy.md"
DEPLOY = ROOT / "deploy"
_BLOCK = re.compile(r"(?:<!-- step: ([^>]*?) -->\n)?```sh\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Step:
    """One block of commands.

    Attributes:
        actors: who runs it, one after the other.
        stays: whether it is a process that stays.
        commands: the shell text.
    """

    actors: tuple[str, ...]
    stays: bool
    commands: str


def steps(text: str | None = None) -> list[Step]:
    """Return every ``sh`` block with what its marker says; one without a marker has no actors."""
    found = []
    for marker, commands in _BLOCK.findall(text if text is not None else RUNBOOK.read_text()):
        stays = marker.endswith(" stays")
        names = marker.removesuffix(" stays")
        actors = tuple(name.strip() for name in names.split(",") if name.strip())
        found.append(Step(actors, stays, commands))
    return found


def put_in(text: str, places: Mapping[str, str]) -> str:
    """Replace placeholders, in one pass, the longest first."""
    pattern = "|".join(re.escape(name) for name in sorted(places, key=len, reverse=True))
    return re.sub(pattern, lambda match: places[match[0]], text)


def copy_with(source: Path, target: Path, places: Mapping[str, str]) -> None:
    """Copy a folder of text files with placeholders replaced."""
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(put_in(path.read_text(), places))
