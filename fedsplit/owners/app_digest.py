"""Which Flower app brought the server's code: a digest over its files.

A ClientApp is told neither the bundle nor its hash (flwr 1.41: ``Message`` and ``Context`` carry
none; the SuperNode's runtime API does, to the process around the ClientApp, and installs the bundle
before it loads the ClientApp).  What can be seen from inside is the folder it was installed to,
``FLWR_HOME/apps/PUBLISHER.NAME.VERSION.HASH8``, which that process puts on ``sys.path``.  So it is
the files in it that are digested: the same for a bundle and for what was installed from it.

This tells an app that was changed from one that was reviewed.  From inside a ClientApp it does not
stop a bundle that brings a ClientApp of its own: then none of this code runs.  What does is
:mod:`fedsplit.deploy.guard`, which digests the bundle itself before anything of it is installed.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from fedsplit.errors import ConfigError, check

# What `flwr build` puts beside an app's files, and Python beside an installed app's.  Nothing else
# is left out: compiled files that a bundle brings are digested like any other.
_MANIFEST = ".info/"
_COMPILED = "__pycache__"
MAX_APP_BYTES = 64 << 20  # unpacked; a bundle is at most 10 MB packed


def digest_of_files(files: Iterable[tuple[str, bytes]]) -> str:
    """Return the digest of (relative path with slashes, content) pairs, in whatever order."""
    whole = hashlib.sha256(b"fedsplit.app.v1")
    for name, content in sorted(files):
        whole.update(
            f"{len(name.encode())} {name} {hashlib.sha256(content).hexdigest()}\n".encode()
        )
    return whole.hexdigest()


def files_of_bundle(bundle: bytes, source: str = "bundle") -> dict[str, bytes]:
    """Return the files that installing a bundle (``.fab``) writes, by relative path.

    Raises:
        ConfigError: no bundle; a path that is absolute, not in its plain form or there twice; more
            than ``MAX_APP_BYTES`` unpacked.
    """
    found: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
            entries = [x for x in archive.infolist() if not x.filename.endswith("/")]
            size = sum(x.file_size for x in entries)
            check(size <= MAX_APP_BYTES, f"app {source}", f"{size} bytes", f"<= {MAX_APP_BYTES}")
            for entry in entries:
                name = entry.filename
                plain = PurePosixPath(name).as_posix() == name and ".." not in name.split("/")
                if not plain or name.startswith("/") or "\\" in name or name in found:
                    raise ConfigError(
                        f"app {source}: path {name[:200]!r}: must be relative, plain and there once"
                    )
                if not name.startswith(_MANIFEST):
                    found[name] = archive.read(entry)
    except ConfigError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"app {source}: must be a .fab file: {error}") from None
    return found


def files_of_folder(folder: Path, *, compiled: bool = False) -> dict[str, bytes]:
    """Return the files of an installed app by relative path.

    Args:
        folder: where it was installed.
        compiled: also those in ``__pycache__``, which Python writes and would read.

    Raises:
        ConfigError: something in it is neither a file nor a folder, or cannot be read.
    """
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ConfigError(f"app {folder}: {name} must be a plain file or folder")
        if path.is_file() and (compiled or _COMPILED not in name.split("/")):
            try:
                found[name] = path.read_bytes()
            except OSError as error:
                raise ConfigError(f"app {folder}: {name} must be readable: {error}") from None
    return found


def digest_of_bundle(bundle: bytes, source: str = "bundle") -> str:
    """Return the digest of a bundle's bytes.

    Raises:
        ConfigError: as :func:`files_of_bundle`.
    """
    return digest_of_files(files_of_bundle(bundle, source).items())


def digest_of_app(path: Path) -> str:
    """Return the digest of a bundle (``.fab``) or of the folder it was installed to.

    Raises:
        ConfigError: neither of the two.
    """
    if path.is_dir():
        return digest_of_files(files_of_folder(path).items())
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"app {path}: must be a .fab file or an app's folder: {error}") from None
    return digest_of_bundle(content, str(path))


def running_app() -> Path | None:
    """Return the folder that this process's app was installed to; None if not exactly one is seen.

    Read from ``sys.path`` and ``FLWR_HOME``; a simulation has no such folder.
    """
    home = Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")
    apps = (home / "apps").resolve()
    found = {Path(x).resolve() for x in sys.path if x}
    mine = [x for x in found if x.parent == apps and (x / "pyproject.toml").is_file()]
    return mine[0] if len(mine) == 1 else None
