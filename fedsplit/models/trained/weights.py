"""What training leaves for serving and export: the trained part of the top, and of what owners
trained.

One safetensors file; its metadata say what it belongs to, so that it cannot be served with another
base, split or method.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedsplit import storage
from fedsplit.config import RunConfig
from fedsplit.errors import ModelError, RunError
from fedsplit.models.splitting.halves import Bottom
from fedsplit.models.splitting.heads import Head

FORMAT = "fedsplit-top-1"
MOST_AXES = 16  # PyTorch reads tensors of more than 64, and then fails to compute with them
OWNERS = "owners."
# Settings without which the tensors mean something else.
BELONGS = (
    *("model.name", "model.task", "model.labels", "model.label-range"),
    *("split.k", "split.bottom", "train.method"),
    *("labels.protection", "labels.tail-blocks", "labels.tail-weights"),
    *("train.lora-rank", "train.lora-alpha", "train.lora-targets", "train.lora-form"),
)
NAMES = "model.label-names"  # told beside them: an exported model says what its outputs mean
TOKENS = "model.max-tokens"  # ... and how long the texts were that it learned from


@dataclass(frozen=True)
class Trained:
    """A checkpoint's content.

    Attributes:
        top: the top's trained parameters by name.
        owners: averaged weights of what owners trained (joint bottom, ``head.*``); often empty.
    """

    top: dict[str, Tensor]
    owners: dict[str, Tensor]


def identity(config: RunConfig, base_digest: str) -> dict[str, str]:
    """Return what a checkpoint belongs to."""
    flat = config.to_flat()
    return {"base": base_digest} | {key: str(flat.get(key, "")) for key in BELONGS}


def described(config: RunConfig, base_digest: str) -> dict[str, str]:
    """Return what a checkpoint says of itself: what it belongs to, and what its outputs mean."""
    return identity(config, base_digest) | {
        NAMES: config.model.label_names,
        TOKENS: str(config.model.max_tokens),
    }


def save_trained(
    path: Path,
    top: Mapping[str, Tensor],
    owners: Mapping[str, Tensor],
    belongs: Mapping[str, str],
) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: the file.
        top: the top's trained parameters.
        owners: averaged weights of what owners trained.
        belongs: from :func:`described`.

    Raises:
        RunError: it cannot be written.
    """
    tensors = {**top, **{OWNERS + name: tensor for name, tensor in owners.items()}}
    try:
        metadata = {"format": FORMAT, "belongs": json.dumps(dict(belongs), sort_keys=True)}
        storage.write_tensors(path, tensors, metadata, durable=False)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error}") from None


def load_trained(path: Path, belongs: Mapping[str, str]) -> Trained:
    """Read a checkpoint of a run with these settings.

    Raises:
        ModelError: no such file, damaged, not finite, or of another base, split or method (named).
    """
    trained, found = read_trained(path)
    found = usual_settings() | found
    for key, expected in belongs.items():
        theirs = found.get(key)
        if theirs != expected:
            raise ModelError(f"{path}: {key}={theirs!r}: must be {expected!r} as in this run")
    return trained


def usual_settings() -> dict[str, str]:
    """Return what a checkpoint that is older than a setting means by it: the default."""
    later = ["model.label-range", NAMES, "labels.tail-blocks", "labels.tail-weights"]
    later += [key for key in BELONGS if ".lora-" in key]
    flat = RunConfig().to_flat()
    return {key: str(flat[key]) for key in later}


def read_trained(path: Path) -> tuple[Trained, dict[str, str]]:
    """Read a checkpoint, and what it says that it belongs to.

    Raises:
        ModelError: no such file, damaged, or not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ModelError(f"{path}: format {metadata.get('format')!r}: must be {FORMAT}")
            found = {str(k): str(v) for k, v in json.loads(metadata.get("belongs", "{}")).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise ModelError(f"{path}: no readable checkpoint: {error}") from None
    for name, value in tensors.items():
        if value.ndim > MOST_AXES or not bool(torch.isfinite(value).all()):
            raise ModelError(f"{path}: {name}: must be finite, with <= {MOST_AXES} axes")
    top = {n: t for n, t in tensors.items() if not n.startswith(OWNERS)}
    owners = {n.removeprefix(OWNERS): t for n, t in tensors.items() if n.startswith(OWNERS)}
    return Trained(top, owners), found


def load_owners(weights: Mapping[str, Tensor], bottom: Bottom, head: Head | None) -> None:
    """Put the averaged weights of what owners trained into the halves.

    Raises:
        ModelError: no parameter of that name and shape.
    """
    known = dict(bottom.named_parameters())
    if head is not None:
        known |= {f"head.{name}": p for name, p in head.named_parameters()}
    for name, value in weights.items():
        if name not in known or known[name].shape != value.shape:
            raise ModelError(f"checkpoint {OWNERS}{name}: no parameter of that name and shape")
        known[name].data.copy_(value)
