"""What a split run leaves: the trained part of the top, and the whole model made from it.

A run's folder is named in two ways: the server's own ``output.dir``, or the folder of an experiment
that has it below, as ``server/``.  :func:`server_folder` takes both.
"""

from __future__ import annotations

from pathlib import Path

from fedsplit.errors import ModelError

FILE = "top.safetensors"
SERVER = "server"


def server_folder(run: Path, *names: str) -> Path | None:
    """Return the server's folder of a run: ``run`` itself, or ``run/server``; None: neither.

    Args:
        run: what a user named.
        names: files or folders, of which the server's folder holds one at least; ``run`` itself is
            looked at first.
    """
    for folder in (run, run / SERVER):
        if any((folder / name).exists() for name in names):
            return folder
    return None


def find_server_folder(run: Path, *names: str, left_by: str) -> Path:
    """Return the server's folder of a run, as :func:`server_folder` finds it.

    Args:
        run: what a user named.
        names: of which it holds one at least.
        left_by: what leaves them there, for the message.

    Raises:
        ModelError: neither ``run`` nor ``run/server`` holds any of them.
    """
    folder = server_folder(run, *names)
    if folder is None:
        raise ModelError(
            f"{run}: must hold {' or '.join(names)}, itself or in {SERVER}/; {left_by} leaves it"
        )
    return folder
