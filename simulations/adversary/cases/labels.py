"""Case 5: labels behind every protection that the policy allows.

The protections of gradients know nothing of what the server sends to be answered, their strength
is the server's setting, a drawn label is drawn anew where the settings differ, and a session's
averages are of the true labels.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from fedsplit.models.bundle.bottom import Bundle
from fedsplit.models.bundle.head import with_head
from fedsplit.models.splitting.heads import detach_head
from simulations.adversary.context import (
    Field,
    label_row,
    settings,
    split_script,
    token_row,
    zeros,
)
from simulations.adversary.material import (
    LANGUAGE,
    Corpus,
    directions,
    pack,
    tiny,
    with_file,
    word_tokenizer,
)
from simulations.adversary.reading import Row, argmin_labels, nearest
from simulations.adversary.server import Step, token_zeros
from simulations.adversary.victim import Policy, Victim, strict_policy

WIDTH = 32
EPSILON = 1.0  # of randomised response, the most that the owner allows


def everything(samples: int) -> bytes:
    """Return the bitmap of a server that holds all samples: no representation is sent again."""
    return bytes([255] * ((samples + 7) // 8))


def _setting(
    field: Field, texts: Corpus, policy: Policy
) -> tuple[Victim, Bundle, Tensor, dict[str, Any], dict[int, int]]:
    """Return an owner, a plain bottom, its vectors, settings of heavy noise, and true labels."""
    tokenizer = word_tokenizer(texts.words)
    table = directions(len(tokenizer), WIDTH)
    bundle, _, _ = pack(tiny(tokenizer, table=table), 0, tokenizer)
    victim = field.victim(texts, policy)
    flat = settings(privacy__mechanism="dchi", privacy__noise_ratio=50.0, labels__epsilon=EPSILON)
    truth = field.truth(victim, flat, bundle, table)[1]
    return victim, bundle, table, flat, truth


def play(field: Field) -> list[Row]:
    """Return what each way reads of the labels, or of a language model's, which are its text."""
    return [
        _gradient(field, "max-norm, zero logits", {"labels.protection": "max-norm"}),
        _gradient(
            field,
            "marvell, noise power 1e-9",
            {"labels.protection": "marvell", "labels.noise-power": 1e-9},
        ),
        _redrawn(field, "drawn again, other epsilons", True),
        _redrawn(field, "drawn again, other tokenizers", False),
        _loss(field),
        _accuracy(field),
        _client_head(field),
        _next_tokens(field),
    ]


def _gradient(field: Field, variant: str, change: dict[str, Any]) -> Row:
    policy = strict_policy(labels__max_epsilon=EPSILON)
    victim, bundle, _, flat, truth = _setting(field, field.corpus(80), policy)
    taken = field.server.session(
        victim, flat | change, split_script(bundle, zeros(2)), digest=bundle.digest
    )
    guesses = argmin_labels(taken.gradients, taken.slots)
    return label_row(5, variant, policy, guesses, truth, [taken])


def _redrawn(field: Field, variant: str, epsilons: bool) -> Row:
    """Randomised response asked again and again in ways that draw anew: a majority vote.

    Args:
        field: where.
        variant: its name in the row.
        epsilons: whether the epsilon is another each time; else the tokenizer is.
    """
    policy = strict_policy(labels__max_epsilon=EPSILON, budget__epochs_per_bottom=200)
    victim, bundle, _, flat, truth = _setting(field, field.corpus(80), policy)
    flat |= {"labels.protection": "randomised-response"}
    votes: dict[int, Counter[int]] = {}
    sessions = []
    words = sorted({word for text in victim.texts for word in text.split()})
    for number in range(15 if field.quick else 90):
        asked, sent = flat, bundle
        if epsilons:
            asked = flat | {"labels.epsilon": EPSILON - 1e-6 * number}
        else:
            ended = word_tokenizer(words, after=[words[number]]).backend_tokenizer
            sent = with_file(bundle, "tokenizer.json", ended.to_str().encode())
        taken = field.server.session(
            victim, asked, split_script(sent, zeros(2), held=everything), digest=sent.digest
        )
        sessions.append(taken)
        for slot, label in argmin_labels(taken.gradients, taken.slots).items():
            votes.setdefault(slot, Counter())[label] += 1
    guesses = {slot: counted.most_common(1)[0][0] for slot, counted in votes.items()}
    return label_row(5, variant, policy, guesses, truth, sessions)


def _loss(field: Field) -> Row:
    """Held-out labels as the binary digits of one average loss: two steps of sixteen labels."""
    policy = strict_policy(labels__max_epsilon=EPSILON)
    victim, bundle, table, flat, _ = _setting(field, field.corpus(160), policy)
    flat |= {
        "labels.protection": "randomised-response",
        "data.test-share": 0.2,  # of the texts, held out
        "train.batch-size": 8,  # evaluation takes twice as many
    }
    truth = field.truth(victim, flat, bundle, table, "evaluate")[1]
    digits: dict[int, float] = {}

    def answer(step: Step) -> Tensor:
        values = torch.zeros(len(step.slots), 2)
        for at, slot in enumerate(step.slots):
            # With logits (0, a) the loss of label 0 is by exactly a above that of label 1.
            digits[slot] = 2.0 ** (at + (4 if step.number == 0 else -12))
            values[at, 1] = digits[slot]
        return values

    taken = field.server.session(
        victim, flat, split_script(bundle, answer), digest=bundle.digest, kind="evaluate"
    )
    guesses = {}
    if "loss" in taken.metrics:
        rest = taken.metrics["loss"] * len(digits)
        rest -= sum(math.log1p(math.exp(-a)) for a in digits.values())
        for slot in sorted(digits, key=lambda s: -digits[s]):
            guesses[slot] = int(rest < digits[slot] - 2.0**-13)
            rest -= 0.0 if guesses[slot] else digits[slot]
    return label_row(5, "digits of an average loss", policy, guesses, truth, [taken])


def _accuracy(field: Field) -> Row:
    """Held-out labels one by one: which accuracy changes when one answer changes?"""
    policy = strict_policy(labels__max_epsilon=EPSILON, budget__sessions_per_day=100)
    texts = field.corpus(150 if field.quick else 200)
    victim, bundle, table, flat, _ = _setting(field, texts, policy)
    flat |= {"labels.protection": "randomised-response", "data.test-share": 0.2}
    truth = field.truth(victim, flat, bundle, table, "evaluate")[1]
    sessions = []

    def accuracy(chosen: int) -> float:
        def answer(step: Step) -> Tensor:
            return torch.tensor([[0.0, 1.0] if s == chosen else [1.0, 0.0] for s in step.slots])

        taken = field.server.session(
            victim,
            flat,
            split_script(bundle, answer, held=everything),
            digest=bundle.digest,
            kind="evaluate",
        )
        sessions.append(taken)
        return taken.metrics.get("accuracy", math.nan)

    usual = accuracy(-1)
    guesses = {}
    for slot in truth:
        found = accuracy(slot)
        if found == found and usual == usual:
            guesses[slot] = int(found > usual)
    return label_row(5, "differences of accuracies", policy, guesses, truth, sessions)


def _client_head(field: Field) -> Row:
    """The head is the owner's, its weights are those that were sent: W^T (p - y) tells y."""
    policy = strict_policy(labels__max_epsilon=EPSILON)
    texts = field.corpus(40, classes=3)
    tokenizer = word_tokenizer(texts.words)
    table = directions(len(tokenizer), WIDTH)
    bundle, _, top = pack(tiny(tokenizer, table=table, classes=3), 0, tokenizer)
    head = detach_head(top)
    whole = with_head(bundle, head)
    weight = next(p for p in head.parameters() if p.shape == (3, WIDTH)).detach()
    victim = field.victim(texts, policy)
    flat = settings(
        privacy__mechanism="dchi",
        privacy__noise_ratio=50.0,
        labels__protection="client-head",
        model__labels=3,
    )
    truth = field.truth(victim, flat, bundle, table)[1]
    taken = field.server.session(
        victim,
        flat,
        split_script(whole, zeros(WIDTH)),
        digest=whole.digest,
    )
    known = (torch.full((3, 3), 1 / 3) - torch.eye(3)) @ weight  # (C, d), one row per label
    guesses: dict[int, int] = {}
    for step, rows in taken.gradients.items():
        alike = torch.nn.functional.cosine_similarity(rows[:, None], known[None], dim=2)
        guesses |= dict(zip(taken.slots[step], alike.argmax(1).tolist(), strict=True))
    return label_row(5, "client head, its weights known", policy, guesses, truth, [taken])


def _next_tokens(field: Field) -> Row:
    """A language model's labels are its text: every gradient tells the next token."""
    policy = strict_policy(labels__max_epsilon=EPSILON)
    texts = field.corpus(40)
    tokenizer = word_tokenizer(texts.words)
    table = directions(len(tokenizer), WIDTH)
    bundle, _, top = pack(tiny(tokenizer, table=table, task=LANGUAGE), 0, tokenizer)
    head = detach_head(top)
    whole = with_head(bundle, head)
    weight = next(p for p in head.parameters() if p.shape == (len(tokenizer), WIDTH)).detach()
    victim = field.victim(texts, policy)
    flat = settings(
        privacy__mechanism="dchi",
        privacy__noise_ratio=50.0,
        labels__protection="client-head",
        model__task=LANGUAGE,
    )
    clean = field.clean(victim, flat, bundle)
    truth = {slot: nearest(rows, table).tolist() for slot, rows in clean.rows.items()}
    taken = field.server.session(
        victim,
        flat,
        split_script(whole, token_zeros(WIDTH)),
        digest=whole.digest,
    )
    guesses: dict[int, list[int]] = {}
    for step, rows in taken.gradients.items():
        lengths = [len(taken.rows[slot]) for slot in taken.slots[step]]
        targets = sum(lengths) - len(lengths)
        found = nearest(weight.mean(0) - targets * rows, weight)
        for slot, ids in zip(taken.slots[step], torch.split(found, lengths), strict=True):
            guesses[slot] = [-1, *ids[:-1].tolist()]
    return token_row(5, "next tokens, client head", policy, guesses, truth, [taken])
