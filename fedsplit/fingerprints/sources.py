"""What a user may name where a model is wanted: weights, a package, a hub, a fingerprint.

Nothing is loaded: weights are viewed in their files (:mod:`fedsplit.fingerprints.weights_file`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsplit.errors import ModelError
from fedsplit.fingerprints.evidence.public_file import PublicFingerprint, read
from fedsplit.fingerprints.view import WeightView
from fedsplit.fingerprints.weights_file import open_view
from fedsplit.models.gguf import SUFFIX as GGUF
from fedsplit.models.layout.projections import layout_of, read_config
from fedsplit.models.places import place_of
from fedsplit.models.shards import TensorFiles
from fedsplit.models.trained import FILE, SERVER, server_folder

_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = ["config.json", "*.safetensors", "model.safetensors.index.json"]


@dataclass(frozen=True)
class Source:
    """One side of a comparison.

    Attributes:
        name: for people.
        folder: where its files lie; None for a fingerprint.
        view: its weights; None for a fingerprint.
        public: a published fingerprint; None for weights.
        model: the model itself where no folder holds it: one that a split run trained.
    """

    name: str
    folder: Path | None = None
    view: WeightView | None = None
    public: PublicFingerprint | None = None
    model: Any = None

    @property
    def width(self) -> int:
        """Residual width."""
        if self.view is not None:
            return self.view.width
        assert self.public is not None
        return self.public.width

    @property
    def depth(self) -> int:
        """Number of blocks."""
        if self.view is not None:
            return self.view.depth
        assert self.public is not None
        return self.public.depth


def open_source(text: str, *, signer: str | None = None, base: str = "") -> Source:
    """Open what ``text`` names.

    Args:
        text: a folder with config.json and safetensors, one ``.safetensors`` file beside its
            config.json, a ``.gguf`` file, ``package:NAME``, a hub name ``owner/name``, a run's
            folder (the server's own, or an experiment's that has it as ``server/``), or a public
            fingerprint (``.json``).
        signer: hexadecimal public key that a fingerprint must be signed by.
        base: where a split run's base is now; empty: where the run had it.  Nothing else heeds it.

    Raises:
        ModelError: if there is nothing of that name, or its files are missing or damaged.
        LineageError: for a damaged fingerprint, another version, or another signer.
        UnsupportedModelError: for architectures that cannot be probed.
    """
    path = Path(text).expanduser()
    if path.is_file() and path.suffix == ".json":
        return Source(path.stem, public=read(path, signer=signer))
    if path.is_file() and path.suffix != GGUF:
        if path.suffix != ".safetensors":
            raise ModelError(
                f"{path}: must be a .safetensors or {GGUF} file, a fingerprint or a folder"
            )
        layout = layout_of(read_config(path.parent))
        files = TensorFiles([path])
        view = WeightView(layout, files.shapes, files.get, get_rows=files.rows)
        return Source(path.stem, path.parent, view)
    run = server_folder(path, FILE)
    if run is not None:
        from fedsplit.models.trained.whole import whole_of_run

        model = whole_of_run(run, base).loaded.model
        return Source(path.resolve().name, view=WeightView.of_module(model), model=model)
    folder = model_folder(text)
    return Source(_short(text), folder, open_view(folder))


def model_folder(text: str) -> Path:
    """Return the folder of a model's files; a hub's are fetched into its cache.

    See :func:`fedsplit.models.places.place_of` for packages and GGUF files.

    Raises:
        ModelError: if there is no such folder, package or hub model.
    """
    path = Path(text).expanduser()
    if not (path / "config.json").exists():
        run = server_folder(path, "model/config.json")
        if run is not None:
            return run / "model"  # what an offsite run, or an export, left there
        if path.is_dir() and not any(path.glob("*.safetensors")):
            raise ModelError(
                f"{text}: must hold config.json and *.safetensors (a model), or itself or in "
                f"{SERVER}/ what a run leaves: {FILE} (split tuning) or model/config.json"
            )
    if path.is_dir():  # weights alone may do: what is missing is told by who reads it
        return path
    place = place_of(text)
    if place is not None:
        return place.folder
    if not _HUB.fullmatch(text):
        raise ModelError(
            f"{text}: no such file or folder; must be one, package:NAME, or a hub's owner/name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=_WANTED))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"{text}: no such folder here, and no such model could be fetched "
            f"({type(error).__name__}: {reason[:200]})"
        ) from error


def _short(text: str) -> str:
    return text.removeprefix("package:").rstrip("/").rsplit("/", 1)[-1] or text
