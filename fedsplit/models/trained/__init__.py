"""What a split run leaves: the trained part of the top, and the whole model made from it."""

from __future__ import annotations

from pathlib import Path

FILE = "top.safetensors"


def is_split_run(folder: Path) -> bool:
    """Return whether a folder is a split run's that kept what it trained."""
    return (folder / FILE).is_file()
