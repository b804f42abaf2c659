"""Finding Flower's commands: those beside this interpreter before any other."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from fedsplit.errors import RunError


def scripts_path() -> str:
    """Return PATH with this interpreter's scripts first, so that Flower's commands are found.

    The SuperLink starts ``flower-superexec`` by name, and that starts the apps by name; without
    this an interpreter called by its path, outside an activated environment, would run others.
    """
    folders = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]
    return os.pathsep.join([*dict.fromkeys(folders), os.environ.get("PATH", os.defpath)])


def find_command(name: str) -> str:
    """Return the path of one of Flower's commands.

    Raises:
        RunError: it is not installed beside this interpreter or on PATH.
    """
    path = shutil.which(name, path=scripts_path())
    if path is None:
        raise RunError(f"{name}: not found beside {sys.executable} or on PATH; install flwr")
    return path
