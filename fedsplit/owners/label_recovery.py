"""How many of an owner's labels could be read off the gradients that left, and the bound on it.

The owner plays the reader of its own gradients before they leave
(:mod:`fedsplit.privacy.labels.readers`).  What each step says of each label is kept in the owner's
home and adds up over steps, sessions, runs and models, as it does for whoever receives them.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedsplit import storage
from fedsplit.owners.policy.rules import Breach, refuse
from fedsplit.privacy.labels.readers import READERS
from fedsplit.privacy.secret import OwnerSecret

RULE = "labels.max_recovery"
FILE = "labels.evidence.jsonl"
_COMPACT_AFTER = 1 << 16  # lines


class _Tally:
    """Evidence about the labels of some texts, and how many of them each reader has right."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[Tensor, int]] = {}  # text -> (readers, C) in nats, true label
        self.right = torch.zeros(len(READERS), dtype=torch.int64)

    def add(self, name: str, label: int, told: Tensor) -> None:
        """Add what one step says of one text."""
        before = self.held.get(name)
        if before is not None:
            self.right -= (before[0].argmax(1) == before[1]).long()
            if before[0].shape == told.shape:
                told = before[0] + told
        self.held[name] = told, label
        self.right += (told.argmax(1) == label).long()

    def breaches(self, bound: float) -> list[Breach]:
        """Return the rule if a reader has more right than the bound explains."""
        count, most = len(self.held), int(self.right.max())
        chance = 2 * math.sqrt(count * bound * (1 - bound))
        ok = most <= count * bound + chance
        return [] if ok else [Breach(RULE, most / count, f"<= {bound:g}")]


class LabelRecovery:
    """Judges a session's gradients against the rule ``labels.max_recovery``.

    A reader's share of right labels may exceed the bound by two standard errors of as many
    independent guesses, over the texts of the session and over all texts ever: at a bound of 75 %
    every one of 12 labels may be read, and no more than 12 of 13.

    Args:
        bound: of the rule, a share.
        truth: (N,), true labels by slot; None: a language model's, which are the text itself.
        texts: identity of each slot's raw text.
        secret: keys the names under which evidence is kept.
        path: the file it is kept in.
    """

    def __init__(
        self,
        bound: float,
        truth: Tensor | None,
        texts: Sequence[bytes],
        secret: OwnerSecret,
        path: Path,
    ) -> None:
        self._truth = truth
        self._bound = bound
        self._path = path
        self._names = [_name(secret, text) for text in texts]
        self._session = _Tally()
        self._ever = _read(path)

    def judge(self, slots: Sequence[int], evidence: Tensor | None) -> None:
        """Add one step's evidence, and refuse to let its gradients leave if too much is read.

        Args:
            slots: the step's samples.
            evidence: (readers, B, C), see :func:`fedsplit.privacy.labels.readers.label_evidence`;
                None: the gradients show every label, or cannot be judged.

        Raises:
            PolicyError: names the rule; the figure stays in the owner's log.
        """
        if evidence is None or self._truth is None:
            refuse([Breach(RULE, 1.0, f"<= {self._bound:g}")] if self._bound < 1 else [])
            return
        lines = []
        for row, slot in enumerate(slots):
            name, label, told = self._names[slot], int(self._truth[slot]), evidence[:, row]
            self._session.add(name, label, told)
            self._ever.add(name, label, told)
            rounded = [[round(x, 4) for x in each] for each in told.tolist()]
            lines.append(json.dumps([name, label, rounded]) + "\n")
        # Kept even if it is refused: what was about to leave was close to it.
        storage.append(self._path, "".join(lines).encode())
        refuse(self._session.breaches(self._bound) + self._ever.breaches(self._bound))


def _name(secret: OwnerSecret, text: bytes) -> str:
    return secret.stream("fedsplit.labels.evidence.v1", text).uniform(2).tobytes()[:8].hex()


def _read(path: Path) -> _Tally:
    """Return the evidence kept so far; a file with many lines per text is written anew, shorter."""
    tally, count = _Tally(), 0
    with contextlib.suppress(FileExistsError):
        storage.create(path, b"")
    with open(path, encoding="ascii") as file:
        for line in file:
            with contextlib.suppress(ValueError):  # cut off by a crash: then it did not leave
                name, label, rows = json.loads(line)
                tally.add(name, int(label), torch.tensor(rows, dtype=torch.float64))
                count += 1
    if count > max(_COMPACT_AFTER, 4 * len(tally.held)):
        kept = [json.dumps([n, y, e.tolist()]) for n, (e, y) in tally.held.items()]
        storage.write(path, "\n".join(kept) + "\n", mode=storage.PRIVATE)
    return tally
