"""Files that attacks read: what a server received, and, in a simulation, what was true.

Both are safetensors.  Per owner and split (``train`` or ``test``):

================================ ======= =====================================================
``OWNER/SPLIT/slots``            int64   (S,), the owner's names for its samples
``OWNER/SPLIT/lengths``          int64   (S,), tokens per sample
``OWNER/SPLIT/rows``             float   transcript: (sum of lengths, d), as received
``OWNER/SPLIT/ids``              int64   truth: (sum of lengths,), the token ids
================================ ======= =====================================================

A truth file exists in simulations alone (whoever runs one knows all texts); no server can write it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedsplit.errors import AttackError

Samples = dict[tuple[str, str], dict[int, Tensor]]
"""(owner, split) -> slot -> one sample's tensor."""

TRUTH = "truth.safetensors"


def read_transcript(path: Path) -> Samples:
    """Return every received sample, ``(T, d)`` float32.

    Raises:
        AttackError: if there is no transcript, or it is damaged.
    """
    if not path.exists():
        raise AttackError(f"{path}: no transcript; run with output.transcript = true")
    found = _read(path, "rows")
    return {key: {slot: x.float() for slot, x in held.items()} for key, held in found.items()}


def read_truth(path: Path) -> Samples:
    """Return every sample's token ids, ``(T,)`` int64.

    Raises:
        AttackError: if there is no such file, or it is damaged.
    """
    if not path.exists():
        raise AttackError(f"{path}: no truth to score against; simulations write one")
    return _read(path, "ids")


def write_truth(path: Path, samples: Mapping[tuple[str, str], Mapping[int, Tensor]]) -> None:
    """Write the truth of a simulation.

    Args:
        path: the file, replaced if it exists.
        samples: (owner, split) -> slot -> ids ``(T,)``.
    """
    tensors: dict[str, Tensor] = {}
    for (owner, part), held in samples.items():
        if not held:
            continue
        rows = [held[slot].to(torch.int64).cpu() for slot in held]
        tensors[f"{owner}/{part}/slots"] = torch.tensor(list(held), dtype=torch.int64)
        tensors[f"{owner}/{part}/lengths"] = torch.tensor([len(x) for x in rows])
        tensors[f"{owner}/{part}/ids"] = torch.cat(rows)
    save_file(tensors, path)


def _read(path: Path, what: str) -> Samples:
    out: Samples = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in sorted(k for k in file.keys() if k.endswith(f"/{what}")):  # noqa: SIM118
                owner, part, _ = key.rsplit("/", 2)
                lengths = file.get_tensor(f"{owner}/{part}/lengths").tolist()
                slots = file.get_tensor(f"{owner}/{part}/slots").tolist()
                rows = torch.split(file.get_tensor(key), lengths)
                out[owner, part] = dict(zip(slots, rows, strict=True))
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise AttackError(f"{path}: must hold slots, lengths and {what}: {error}") from None
    return out


def chosen_samples(
    received: Samples, truth: Samples, samples: int, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the rows and the ids of up to ``samples`` samples, drawn over all owners by the seed.

    Raises:
        AttackError: if a sample was received whose truth is missing or of another length.
    """
    from fedsplit.seeding import numpy_generator

    pool = [(key, slot) for key, held in sorted(received.items()) for slot in sorted(held)]
    order = numpy_generator(seed, "attack").permutation(len(pool))[:samples]
    rows, ids = [], []
    for key, slot in (pool[i] for i in sorted(order)):
        row, true = received[key][slot], truth.get(key, {}).get(slot)
        if true is None or len(true) != len(row):
            found = "missing" if true is None else f"{len(true)} tokens"
            raise AttackError(
                f"truth of {key[0]}/{key[1]} slot {slot}: {found}: must be {len(row)}"
            )
        rows.append(row)
        ids.append(true)
    return rows, ids
