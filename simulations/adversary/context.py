"""What every case is given: a folder, a lying server, texts, and how much it may spend."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedsplit.models.bundle import tokenizer as tokenizer_files
from fedsplit.models.bundle.bottom import Bundle
from simulations.adversary.material import LANGUAGE, Corpus, corpus
from simulations.adversary.reading import Row, allowed, nearest, score
from simulations.adversary.server import (
    LyingServer,
    Taken,
    settings,
    split_script,
    token_zeros,
    zeros,
)
from simulations.adversary.victim import Policy, Victim


@dataclass
class Field:
    """Where one case is played.

    Attributes:
        folder: for the owners' homes.
        server: the liar's.
        quick: whether only what a test's seconds allow is spent.
        real: whether SST-2's sentences are used where they are there.
    """

    folder: Path
    server: LyingServer
    quick: bool = False
    real: bool = False
    _numbers: Any = field(default_factory=itertools.count)
    _known: tuple[tuple[Path, str], dict[tuple[int, ...], int]] | None = None

    def corpus(self, count: int, *, classes: int = 2, seed: int = 0) -> Corpus:
        """Return texts of an owner."""
        return corpus(count, classes=classes, seed=seed, real=self.real)

    def victim(self, texts: Corpus, policy: Policy | None) -> Victim:
        """Return a new owner with these texts."""
        return Victim(self.new_folder("victim"), texts.texts, texts.labels, policy)

    def new_folder(self, name: str) -> Path:
        """Return an empty folder."""
        path = self.folder / f"{name}-{next(self._numbers)}"
        path.mkdir(parents=True)
        return path

    def clean(
        self, victim: Victim, flat: Mapping[str, Any], bundle: Bundle, kind: str = "train"
    ) -> Taken:
        """Return a session of the same owner under a policy that lets everything out as it is."""
        plain = dict(flat) | {
            "privacy.mechanism": "none",
            "privacy.noise-ratio": 0.0,
            "privacy.eta": 0.0,
            "labels.protection": "none",
            "split.k": 0,
            "split.bottom": "frozen",
            "strategy": "split-tuning",
        }
        answer = zeros(int(flat["model.labels"]))
        if flat["model.task"] == LANGUAGE:
            vocabulary = int(json.loads(bundle.files["config.json"])["vocab_size"])
            answer = token_zeros(vocabulary)
        found = self.server.session(
            victim.without_protection(self.new_folder("truth")),
            plain,
            split_script(bundle, answer),
            digest=bundle.digest,
            kind=kind,
        )
        if found.told:
            raise AssertionError(f"the owner without protection refused: {found.told}")
        return found

    def truth(
        self,
        victim: Victim,
        flat: Mapping[str, Any],
        bundle: Bundle,
        table: torch.Tensor,
        kind: str = "train",
    ) -> tuple[dict[int, list[int]], dict[int, int]]:
        """Return what there was to read, by slot: token ids and labels.

        ``bundle`` must be of embeddings alone (k = 0) with the rows of ``table``.
        """
        found = self.clean(victim, flat, bundle, kind)
        ids = {slot: nearest(rows, table).tolist() for slot, rows in found.rows.items()}
        return ids, {slot: self._label(victim, bundle, row) for slot, row in ids.items()}

    def _label(self, victim: Victim, bundle: Bundle, ids: Sequence[int]) -> int:
        """Return the label of the owner's text that has these token ids."""
        if self._known is None or self._known[0] != (victim.folder, bundle.digest):
            tokenizer = tokenizer_files.unpack(bundle.files)
            assert tokenizer is not None
            assert victim.labels is not None
            rows = tokenizer(list(victim.texts))["input_ids"]
            labels = {tuple(row): int(y) for row, y in zip(rows, victim.labels, strict=True)}
            self._known = (victim.folder, bundle.digest), labels
        return self._known[1].get(tuple(ids), -1)


def token_row(
    case: int,
    variant: str,
    policy: Policy,
    guesses: Mapping[int, Sequence[int]],
    truth: Mapping[int, Sequence[int]],
    sessions: Sequence[Taken],
    ignore: Sequence[int] = (0, 1),
    unit: str = "tokens",
) -> Row:
    """Return the row of an attack on tokens (or labels, as texts of one)."""
    read, targets, guess = score(guesses, truth, ignore)
    return Row(
        case,
        variant,
        read,
        allowed(policy, unit, guess, targets),
        targets,
        unit,
        sum(t.size for t in sessions),
        first_refusal(sessions),
    )


def label_row(
    case: int,
    variant: str,
    policy: Policy,
    guesses: Mapping[int, int],
    truth: Mapping[int, int],
    sessions: Sequence[Taken],
) -> Row:
    """Return the row of an attack on labels."""
    return token_row(
        case,
        variant,
        policy,
        {s: [y] for s, y in guesses.items()},
        {s: [y] for s, y in truth.items()},
        sessions,
        (),
        "labels",
    )


def share_row(
    case: int,
    variant: str,
    read: float,
    allowance: float,
    targets: int,
    unit: str,
    sessions: Sequence[Taken] = (),
) -> Row:
    """Return a row whose share was counted by the case itself."""
    left = sum(t.size for t in sessions)
    return Row(case, variant, read, allowance, targets, unit, left, first_refusal(sessions))


def first_refusal(sessions: Sequence[Taken]) -> str:
    """Return the first refusal's text, shortened and harmless to a terminal."""
    told = next((t.told[0] for t in sessions if t.told), "")
    return told.encode("unicode_escape").decode("ascii")[:160]


Play = Callable[[Field], list[Row]]
__all__ = [
    "Field",
    "Play",
    "first_refusal",
    "label_row",
    "settings",
    "share_row",
    "split_script",
    "token_row",
    "zeros",
]
