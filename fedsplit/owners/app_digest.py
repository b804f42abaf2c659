"""Which Flower app brought the server's code: a digest over its files.

A ClientApp is told neither the bundle nor its hash (flwr 1.41: ``Message`` and ``Context`` carry
none; the SuperNode's runtime API does, to the process around the ClientApp, and installs the bundle
before it loads the ClientApp).  What can be seen from inside is the folder it was installed to,
``FLWR_HOME/apps/PUBLISHER.NAME.VERSION.HASH8``, which that process puts on ``sys.path``.  So it is
the files in it that are digested: the same for a bundle and for what was installed from it.

This tells an app that was changed from one that was reviewed.  It does not stop a bundle that
brings a ClientApp of its own: then none of this code runs (see docs/owner.md).
"""

from __future__ import annotations

import hashlib
import os
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from fedsplit.errors import ConfigError

_LEFT_OUT = {"__pycache__", ".info"}


def digest_of_files(files: Iterable[tuple[str, bytes]]) -> str:
    """Return the digest of (relative path with slashes, content) pairs, in whatever order."""
    whole = hashlib.sha256(b"fedsplit.app.v1")
    for name, content in sorted(files):
        whole.update(
            f"{len(name.encode())} {name} {hashlib.sha256(content).hexdigest()}\n".encode()
        )
    return whole.hexdigest()


def digest_of_app(path: Path) -> str:
    """Return the digest of a bundle (``.fab``) or of the folder it was installed to.

    Raises:
        ConfigError: neither of the two.
    """
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.is_file()]
        named = [(p.relative_to(path), p) for p in found]
        return digest_of_files(
            (name.as_posix(), p.read_bytes())
            for name, p in named
            if not _LEFT_OUT & set(name.parts)
        )
    try:
        with zipfile.ZipFile(path) as bundle:
            names = [n for n in bundle.namelist() if not n.endswith("/")]
            return digest_of_files(
                (n, bundle.read(n)) for n in names if not _LEFT_OUT & set(n.split("/"))
            )
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"app {path}: must be a .fab file or an app's folder: {error}") from None


def running_app() -> Path | None:
    """Return the folder that this process's app was installed to; None if not exactly one is seen.

    Read from ``sys.path`` and ``FLWR_HOME``; a simulation has no such folder.
    """
    home = Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")
    apps = (home / "apps").resolve()
    found = {Path(x).resolve() for x in sys.path if x}
    mine = [x for x in found if x.parent == apps and (x / "pyproject.toml").is_file()]
    return mine[0] if len(mine) == 1 else None
