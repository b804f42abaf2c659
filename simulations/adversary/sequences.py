"""Whole sequences of lies, and every attacker handed all that left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsplit.models.bundle.bottom import Bundle
from simulations.adversary.context import Field, settings, split_script
from simulations.adversary.material import (
    FILLER,
    directions,
    pack,
    tiny,
    with_file,
    word_tokenizer,
)
from simulations.adversary.reading import Row, allowed, argmin_labels, average, nearest, score
from simulations.adversary.server import Answer, Step, Taken
from simulations.adversary.victim import strict_policy

WIDTH = 32
ENDS = [f"[E{i}]" for i in range(8)]
LOUD = 1000.0


@dataclass(frozen=True)
class Lie:
    """One message of a lying server.

    Attributes:
        kind: Flower's message type.
        mode: of the offer.
        round: of the offer.
        end: token that the tokenizer puts behind every text; -1: none.
        table: which of the server's embeddings; each has vectors of its own for every word.
        loud: whether real words are far longer than the fillers that fill the vocabulary.
        logits: ``zero``, ``sure`` (of class 0), ``random``, ``nan`` or ``short`` (a class too few).
        held: whether the server says that it holds all samples.
        more: further run settings.
    """

    kind: str = "train"
    mode: str = "train"
    round: int = 1
    end: int = -1
    table: int = 0
    loud: bool = False
    logits: str = "zero"
    held: bool = False
    more: tuple[tuple[str, Any], ...] = ()


def nothing(samples: int) -> bytes:
    """Return the bitmap of a server that holds no sample."""
    return b""


def everything(samples: int) -> bytes:
    """Return the bitmap of a server that holds all samples."""
    return b"\xff" * ((samples + 7) // 8)


def _answer(name: str, seed: int) -> Answer:
    generator = torch.Generator().manual_seed(seed)

    def answer(step: Step) -> Tensor:
        size = (len(step.slots), 2)
        if name == "random":
            return torch.randn(size, generator=generator)
        if name == "sure":
            return torch.tensor([[30.0, -30.0]]).repeat(size[0], 1)
        if name == "nan":
            return torch.full(size, 1e6)
        return torch.zeros(size[0], 1 if name == "short" else 2)

    return answer


def play_lies(field: Field, lies: Sequence[Lie], count: int = 24) -> list[Row]:
    """Return what the strongest attacker reads of tokens and labels after all of ``lies``.

    Args:
        field: where.
        lies: in order, to one owner.
        count: its texts.
    """
    texts = field.corpus(count)
    listed = [*ENDS, FILLER, *(f"~{i}" for i in range(1023)), *texts.words]
    tokenizer = word_tokenizer(listed)
    first = tokenizer.get_vocab()[texts.words[0]]
    policy = strict_policy(labels__max_epsilon=1.0)
    victim = field.victim(texts, policy)
    base = settings(
        privacy__mechanism="dchi",
        privacy__noise_ratio=40.0,
        labels__protection="randomised-response",
        labels__epsilon=1.0,
        train__batch_size=8,
    )
    tables: dict[tuple[int, bool], Tensor] = {}
    bundles: dict[tuple[int, bool], Bundle] = {}

    def bundle_of(number: int, loud: bool) -> Bundle:
        key = (number, loud)
        if key not in bundles:
            tables[key] = directions(len(tokenizer), WIDTH, number)
            if loud:
                tables[key][first:] *= LOUD
            bundles[key] = pack(tiny(tokenizer, table=tables[key]), 0, tokenizer)[0]
        return bundles[key]

    received: list[tuple[Lie, Taken]] = []
    for lie in lies:
        after = [ENDS[lie.end]] if lie.end >= 0 else []
        text = word_tokenizer(listed, after=after, spread=8 if lie.loud else 0)
        bundle = with_file(
            bundle_of(lie.table, lie.loud),
            "tokenizer.json",
            text.backend_tokenizer.to_str().encode(),
        )
        script = split_script(
            bundle, _answer(lie.logits, lie.round), held=everything if lie.held else nothing
        )
        taken = field.server.session(
            victim,
            base | dict(lie.more),
            script,
            digest=bundle.digest,
            kind=lie.kind,
            mode=lie.mode,
            round=lie.round,
        )
        received.append((lie, taken))
    plain = bundle_of(0, False)
    table = tables[0, False]
    rows = []
    best: tuple[float, int, float] = (0.0, 1, 0.0)
    for split in ("train", "evaluate"):
        truth = field.truth(victim, base, plain, table, split)[0]
        for guesses in _token_attackers(received, split, tables, first):
            found = score(guesses, truth, range(first))
            best = max(best, found)
    sessions = [taken for _, taken in received]
    left = sum(t.size for t in sessions)
    allowance = allowed(policy, "tokens", best[2], best[1])
    rows.append(Row(0, "sequence", best[0], allowance, best[1], "tokens", left))
    truth_labels = field.truth(victim, base, plain, table)[1]
    votes: dict[int, Counter[int]] = {}
    for lie, taken in received:
        if lie.mode == "train":
            for slot, label in argmin_labels(taken.gradients, taken.slots).items():
                votes.setdefault(slot, Counter())[label] += 1
    labels = {slot: [counted.most_common(1)[0][0]] for slot, counted in votes.items()}
    read, targets, guess = score(labels, {s: [y] for s, y in truth_labels.items()})
    rows.append(
        Row(0, "sequence", read, allowed(policy, "labels", guess, targets), targets, "labels", left)
    )
    return rows


def _token_attackers(
    received: Sequence[tuple[Lie, Taken]],
    split: str,
    tables: Mapping[tuple[int, bool], Tensor],
    first: int,
) -> list[dict[int, list[int]]]:
    """Return the guesses of each attacker: on every session alone, and on all of a table's."""
    found = []
    by_table: dict[tuple[int, bool], list[dict[int, Tensor]]] = {}
    for lie, taken in received:
        if ("train" if lie.mode == "train" else "evaluate") != split or not taken.rows:
            continue
        key = (lie.table, lie.loud)
        cut = 1 if lie.end >= 0 else 0
        rows = {s: x[: len(x) - cut] for s, x in taken.rows.items()}
        by_table.setdefault(key, []).append(rows)
    for key, views in by_table.items():
        for seen in (*([v] for v in views), views):
            guesses = {}
            for slot, mean in average(seen).items():
                ids = nearest(mean, tables[key]).tolist()
                guesses[slot] = [i for i in ids if i >= first] if key[1] else ids
            found.append(guesses)
    return found
