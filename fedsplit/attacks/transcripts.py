"""Files that attacks read: what a server received, and, in a simulation, what was true.

All are safetensors.  A transcript has, per owner and split (``train`` or ``test``):

================================ ======= =====================================================
``OWNER/SPLIT/slots``            int64   (S,), the owner's names for its samples
``OWNER/SPLIT/lengths``          int64   (S,), tokens per sample
``OWNER/SPLIT/rows``             float   (sum of lengths, d), as received
``OWNER/SPLIT/rows.N``           float   the same again: view N = 1, 2 ... of every sample
``OWNER/SPLIT/outputs``          float   (S, C) or (sum of lengths, c): what the server sent
``OWNER/SPLIT/gradients``        float   the same shape: what was returned for it
``OWNER/SPLIT/outputs.N``        float   the same in pass N = 1, 2 ... over the samples,
``OWNER/SPLIT/gradients.N``              and what was returned there
``OWNER/SPLIT/NAME.slots``       int64   samples of NAME where they are fewer, with
``OWNER/SPLIT/NAME.lengths``             their lengths
================================ ======= =====================================================

(any of the tensors may be missing; gradients are of each target's own loss), and a truth file,
which exists in simulations alone, since whoever runs one knows all texts: slots, lengths and
``ids`` int64 (sum of lengths,), and where there are classes ``labels`` int64 (S,).

An update of weights has ``before/NAME`` and ``after/NAME``, or ``gradient/NAME`` of one batch's
mean loss with ``shape`` (2,) = B, T and ``labels`` (B,); its truth lists the batch's samples.  A
tuned model's answers have ``logits`` (N, C) and ``labels`` (N,), and where there are shadow models
``shadow_logits`` (K, N, C) and ``shadow_members`` (K, N); their truth is ``members`` (N,).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedsplit.errors import AttackError
from fedsplit.seeding import numpy_generator

Samples = dict[tuple[str, str], dict[int, Tensor]]
"""(owner, split) -> slot -> one sample's tensor."""

TRANSCRIPT = "transcript.safetensors"
CAPTURE = "capture"
TRUTH = "truth.safetensors"


@dataclass
class Transcript:
    """What crossed, sample by sample.

    Attributes:
        rows: representations, one view after another; of a view, ``(T, d)`` float32 a sample.
        gradients: what was returned, pass after pass: ``(c,)`` or ``(T, c)`` a sample.
        outputs: what the server sent and each gradient answers: logits or final hidden states.
    """

    rows: list[Samples] = field(default_factory=list)
    gradients: list[Samples] = field(default_factory=list)
    outputs: list[Samples] = field(default_factory=list)

    def answered(self) -> Samples:
        """Return the rows of those texts of a language model that gradients came back for.

        Attacks on both directions are about these alone: held-out texts have no gradients.
        """
        first = self.outputs[0] if self.outputs else {}
        rows = self.rows[0] if self.rows else first
        return {
            key: {slot: rows[key][slot] for slot, x in held.items() if x.dim() == 2}
            for key, held in first.items()
            if any(x.dim() == 2 for x in held.values())
        }

    def parts(self) -> dict[str, list[Samples]]:
        """Return what the file names: rows, gradients, outputs, each a list of passes."""
        return {"rows": self.rows, "gradients": self.gradients, "outputs": self.outputs}

    @property
    def received(self) -> Samples:
        """The first view of every sample, of representations or else of gradients."""
        found = self.rows or self.gradients
        return found[0] if found else {}


def read_transcript(path: Path) -> Samples:
    """Return the first view of every received sample, ``(T, d)`` float32.

    Raises:
        AttackError: if there is no transcript, or it is damaged.
    """
    found = read_whole_transcript(path).rows
    return found[0] if found else {}


def read_whole_transcript(path: Path) -> Transcript:
    """Return everything that a transcript holds.

    Raises:
        AttackError: if there is no transcript, or it is damaged.
    """
    if not path.exists():
        raise AttackError(f"{path}: no transcript; run with output.transcript = true")
    found = Transcript()
    for name, into in found.parts().items():
        for number in range(1 << 16):
            held = _read(path, f"{name}.{number}" if number else name)
            if not held:
                break
            into.append({k: {slot: x.float() for slot, x in v.items()} for k, v in held.items()})
    return found


def write_transcript(path: Path, transcript: Transcript) -> None:
    """Write a transcript."""
    save_file(transcript_tensors(transcript), path)


def transcript_tensors(
    transcript: Transcript, already: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return a transcript under the keys of its file, beside those that the file already has."""
    tensors = dict(already or {})
    for name, views in transcript.parts().items():
        for number, held in enumerate(views):
            _put(tensors, f"{name}.{number}" if number else name, held)
    return tensors


def read_truth(path: Path) -> Samples:
    """Return every sample's token ids, ``(T,)`` int64.

    Raises:
        AttackError: if there is no such file, or it is damaged.
    """
    return _read(_truth(path), "ids")


def read_true_labels(path: Path) -> Samples:
    """Return every sample's private label, ``()`` int64; nothing where there are no classes.

    Raises:
        AttackError: if there is no such file, or it is damaged.
    """
    return _read(_truth(path), "labels")


def write_truth(
    path: Path,
    samples: Mapping[tuple[str, str], Mapping[int, Tensor]],
    labels: Mapping[tuple[str, str], Mapping[int, int]] | None = None,
) -> None:
    """Write the truth of a simulation.

    Args:
        path: the file, replaced if it exists.
        samples: (owner, split) -> slot -> ids ``(T,)``.
        labels: (owner, split) -> slot -> private label, of the same samples.
    """
    tensors: dict[str, Tensor] = {}
    _put(tensors, "ids", {k: {i: x.long() for i, x in v.items()} for k, v in samples.items()})
    for (owner, part), held in (labels or {}).items():
        if held:
            slots = tensors[f"{owner}/{part}/slots"].tolist()
            tensors[f"{owner}/{part}/labels"] = torch.tensor([held[slot] for slot in slots])
    save_file(tensors, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a file.

    Raises:
        AttackError: if there is no such file, or it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as error:
        raise AttackError(f"{path}: must be a safetensors file: {error}") from None


def _truth(path: Path) -> Path:
    if not path.exists():
        raise AttackError(f"{path}: no truth to score against; simulations write one")
    return path


def _put(
    tensors: dict[str, Tensor], name: str, samples: Mapping[tuple[str, str], Mapping[int, Tensor]]
) -> None:
    for (owner, part), held in samples.items():
        if not held:
            continue
        order = sorted(held)
        prefix, rows = f"{owner}/{part}", [held[slot].cpu() for slot in order]
        single = rows[0].dim() == 1 and not name.startswith(("rows", "ids"))
        slots = torch.tensor(order, dtype=torch.int64)
        lengths = torch.tensor([1 if single else len(x) for x in rows])
        tensors[f"{prefix}/{name}"] = torch.stack(rows) if single else torch.cat(rows)
        common = tensors.setdefault(f"{prefix}/slots", slots)
        known = tensors.setdefault(f"{prefix}/lengths", lengths)
        if not common.equal(slots) or not (single or known.equal(lengths)):
            tensors[f"{prefix}/{name}.slots"] = slots  # an owner was lost, or the disk was full
            tensors[f"{prefix}/{name}.lengths"] = lengths


def _read(path: Path, what: str) -> Samples:
    out: Samples = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in sorted(k for k in file.keys() if k.endswith(f"/{what}")):  # noqa: SIM118
                owner, part, _ = key.rsplit("/", 2)
                own = f"{key}." if f"{key}.slots" in file.keys() else f"{owner}/{part}/"  # noqa: SIM118
                lengths = file.get_tensor(f"{own}lengths").tolist()
                slots = file.get_tensor(f"{own}slots").tolist()
                whole = file.get_tensor(key)
                # One value a sample, or one a token.
                steps = what.startswith(("gradients", "outputs"))
                single = what == "labels" or (steps and len(whole) == len(slots))
                rows = whole.unbind(0) if single else torch.split(whole, lengths)
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
    rows, ids = [], []
    for key, slot in choose(received, samples, seed):
        row, true = received[key][slot], truth.get(key, {}).get(slot)
        if true is None or (row.dim() == 2 and len(true) != len(row)):
            found = "missing" if true is None else f"{len(true)} tokens"
            raise AttackError(
                f"truth of {key[0]}/{key[1]} slot {slot}: {found}: must be {len(row)}"
            )
        rows.append(row)
        ids.append(true)
    return rows, ids


def choose(received: Samples, samples: int, seed: int = 0) -> list[tuple[tuple[str, str], int]]:
    """Return which samples are attacked, (owner, split) and slot, drawn over all by the seed."""
    pool = [(key, slot) for key, held in sorted(received.items()) for slot in sorted(held)]
    order = numpy_generator(seed, "attack").permutation(len(pool))[:samples]
    return [pool[i] for i in sorted(order)]
