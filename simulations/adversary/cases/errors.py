"""Case 6: values in refusals, and what an error tells by being one."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from simulations.adversary.context import (
    Field,
    settings,
    share_row,
    split_script,
    token_row,
    zeros,
)
from simulations.adversary.material import (
    BERT,
    directions,
    pack,
    tiny,
    with_file,
    word_tokenizer,
)
from simulations.adversary.reading import Row, score
from simulations.adversary.server import Step, Taken
from simulations.adversary.victim import strict_policy

WIDTH = 32


def play(field: Field) -> list[Row]:
    """Return which facts about texts and labels refusals tell."""
    return [_not_finite(field), _classes(field), _presence(field)]


def _number(taken: Taken, pattern: str) -> int | None:
    """Return the number in the owner's words that the pattern's group finds."""
    for told in taken.told:
        if match := re.search(pattern, told):
            return int(match[1])
    return None


def _facts(
    field: Field,
    variant: str,
    guesses: Mapping[int, int],
    truth: Mapping[int, int],
    sessions: list[Taken],
    unit: str,
) -> Row:
    """Return the row of values, one per session or text, that refusals told."""
    return token_row(
        6,
        variant,
        strict_policy(),
        {i: [v] for i, v in guesses.items()},
        {i: [v] for i, v in truth.items()},
        sessions,
        (),
        unit,
    )


def _not_finite(field: Field) -> Row:
    """Every other word overflows in the first norm: the refusal counts those of one text."""
    texts = field.corpus(24 if field.quick else 60)
    words = texts.words
    size = 1024 + 3 * len(words)
    steps = {int(x) for x in torch.linspace(0, size - 1, 1024, dtype=torch.float64)}
    free = [i for i in range(10, size) if i not in steps][: len(words)]
    place = dict(zip(free, words, strict=False))
    tokenizer = word_tokenizer([place.get(i) or f"~f{i}" for i in range(2, size)])
    table = directions(len(tokenizer), WIDTH)
    plain, _, _ = pack(tiny(tokenizer, table=table), 0, tokenizer)
    marked = set(free[::2])
    loud = table.clone()
    loud[sorted(marked)] = 3e38
    bundle, _, _ = pack(tiny(tokenizer, family=BERT, table=loud), 0, tokenizer)
    victim = field.victim(texts, strict_policy())
    flat = settings(
        privacy__mechanism="dchi",
        privacy__eta=0.1,
        labels__protection="randomised-response",
        train__batch_size=1,
    )
    ids, _ = field.truth(victim, flat, plain, table)
    # The order of the steps follows from the run's seed and the owner's public name.
    order = field.clean(victim, flat, plain).slots
    guesses: dict[int, int] = {}
    truth: dict[int, int] = {}
    sessions = []
    for step, slots in sorted(order.items()):
        taken = field.server.session(
            victim,
            flat,
            split_script(bundle, zeros(2), steps=step),
            digest=bundle.digest,
            first=step,
        )
        sessions.append(taken)
        truth[step] = sum(token in marked for token in ids[slots[0]])
        found = _number(taken, r"(\d+) NaN")
        if found is not None:
            guesses[step] = found // WIDTH
    return _facts(field, "count of words, not finite", guesses, truth, sessions, "facts")


def _classes(field: Field) -> Row:
    """Two logits for a problem of six classes: the refusal tells the batch's largest label."""
    texts = field.corpus(160, classes=6)
    tokenizer = word_tokenizer(texts.words)
    table = directions(len(tokenizer), WIDTH)
    bundle, _, _ = pack(tiny(tokenizer, table=table), 0, tokenizer)
    victim = field.victim(texts, strict_policy())
    flat = settings(
        privacy__mechanism="dchi",
        privacy__noise_ratio=50.0,
        labels__protection="randomised-response",
        model__labels=6,
        train__batch_size=1,
        data__test_share=0.2,
    )
    labels = field.truth(victim, flat, bundle, table, "evaluate")[1]
    order = field.clean(victim, flat, bundle, "evaluate").slots
    guesses: dict[int, int] = {}
    truth: dict[int, int] = {}
    sessions = []
    for chosen, slots in sorted(order.items()):

        def answer(step: Step, chosen: int = chosen) -> Tensor:
            return torch.zeros(len(step.slots), 2 if step.number == chosen else 6)

        taken = field.server.session(
            victim, flat, split_script(bundle, answer), digest=bundle.digest, kind="evaluate"
        )
        sessions.append(taken)
        truth[chosen] = max(labels[slot] for slot in slots)
        found = _number(taken, r"must be > (\d+)")
        if found is not None:
            guesses[chosen] = found
    return _facts(field, "largest label of a batch", guesses, truth, sessions, "facts")


def _presence(field: Field) -> Row:
    """A word whose id has no row ends the session if any text has it: a bit per session."""
    texts = field.corpus(12)
    inside = sorted({word for text in texts.texts for word in text.split()})
    outside = [f"x{i}" for i in range(len(inside))]
    many = 4 if field.quick else 12
    asked = [*inside[:many], *outside[:many]]
    tokenizer = word_tokenizer([*inside, *outside])
    table = directions(len(tokenizer), WIDTH)
    bundle, _, _ = pack(tiny(tokenizer, table=table), 0, tokenizer)
    victim = field.victim(texts, strict_policy())
    flat = settings(
        privacy__mechanism="dchi",
        privacy__noise_ratio=50.0,
        labels__protection="randomised-response",
        train__batch_size=64,
    )
    guesses: dict[int, int] = {}
    truth: dict[int, int] = {}
    sessions = []
    trained = field.truth(victim, flat, bundle, table)[0]
    seen = {token for row in trained.values() for token in row}
    text = tokenizer.backend_tokenizer.to_str()
    for number, word in enumerate(asked):
        index = tokenizer.get_vocab()[word]
        ids = {f'"{word}":{index}{end}': f'"{word}":{10**6}{end}' for end in ",}"}
        changed = text
        for before, after in ids.items():
            changed = changed.replace(before, after)
        taken, usual = (
            field.server.session(victim, flat, split_script(sent, zeros(2)), digest=sent.digest)
            for sent in (
                with_file(bundle, "tokenizer.json", changed.encode()),
                with_file(bundle, "tokenizer.json", (text + "\n" * (number + 1)).encode()),
            )
        )
        sessions.append(taken)
        truth[number] = int(index in seen)
        guesses[number] = int(taken.told != usual.told)
    read, targets, guess = score(
        {i: [v] for i, v in guesses.items()}, {i: [v] for i, v in truth.items()}
    )
    return share_row(6, "presence of a word", read, max(guess, 0.75), targets, "facts", sessions)
