"""The attackers that an owner runs on itself before anything leaves, and how they are scored.

With embeddings alone at the owner (k = 0), every attacker that fits runs in full: nearest vector,
maximum a posteriori, and the same in context.  Behind blocks (k > 0) an inverter is taught on
public text, the vocabulary is sent through the bottom for the state that each token has, and what
both propose is sent through it again and judged by the law of the noise, each for a third of a
budget of seconds: the search reads as many texts as there is time for, one at least.
Several views of a text are read as their mean.  Attackers
that weigh by language are run with public text, and again with more texts of the owner's kind: a
server may well have the like.

The tokenizer is the server's, so its word is not taken for what is a special token: positions that
every text has in common are not scored, and besides the share of tokens read two more count, the
share of *different* tokens read and that of tokens that stand for the raw text, so that fillers
between the words do not hide how well the words themselves are read.  The most of the three is the
figure.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsplit.attacks.base import Public, TokenAttack, View
from fedsplit.attacks.inversion.averaging import MeanOfViews, average_views
from fedsplit.attacks.scoring import clustered_interval
from fedsplit.attacks.table import suited
from fedsplit.models.splitting.representations import represent
from fedsplit.privacy.empirical import Exposed, Reading

# What they may spend; the learned one and the search after it are bound by the owner's seconds.
BUDGET: dict[str, dict[str, Any]] = {
    "nearest": {"top_k": 1},
    "map": {"top_k": 1},
    "contextual": {"top_k": 1},
    "replaced_tokens": {"top_k": 1},
    "optimisation": {"samples": 4, "steps": 100},
    "exact_search": {"samples": 2},
}
BY_LANGUAGE = ("map", "contextual", "replaced_tokens")
_STATES = 0.25  # share of the seconds that public text may take through the bottom
_CHUNK = 32


def measure(exposed: Exposed) -> list[Reading]:
    """Return what each attacker of the setting's kind reads, the best reader first.

    Raises:
        AttackError, PrivacyError: an attack cannot be carried out on what is there.
    """
    if not exposed.mechanism.protects():
        targets = sum(len(ids) for ids in _own(exposed.ids, exposed.ids))
        return [Reading("no noise", 1.0, 1.0, 1.0, targets, 0.0)]
    rows, _ = average_views(exposed.views)
    mechanism = exposed.mechanism
    if len(exposed.views) > 1 and mechanism.adds_noise:
        mechanism = MeanOfViews(of=mechanism, views=len(exposed.views), row_clip=mechanism.row_clip)
    known, others = [list(x) for x in exposed.known], [list(x) for x in exposed.others]
    public = Public(exposed.bottom, mechanism, known, touched=exposed.touched)
    left = exposed.seconds
    if exposed.bottom.k > 0:
        begin = time.perf_counter()
        public = _behind_blocks(public, others, _STATES * exposed.seconds)
        left -= time.perf_counter() - begin
    share = max(1.0, left / 3)
    budget = {
        **BUDGET,
        "learned": {"seconds": share},
        "token_states": {"seconds": share},
        "text_search": {"samples": 0, "seconds": share},
    }
    view = View(public, rows)
    found = [_read(attack, view, exposed) for attack in _chosen(view, budget)]
    if others and exposed.bottom.k == 0:
        like = View(replace(public, public_ids=others), rows)
        for attack in _chosen(like, budget):
            if attack.name in BY_LANGUAGE:
                reading = _read(attack, like, exposed)
                found.append(replace(reading, attack=f"{attack.name}, texts of the kind"))
    return sorted(found, key=lambda reading: -reading.read)


def _chosen(view: View, budget: dict[str, dict[str, Any]]) -> list[TokenAttack]:
    """Return the attacks on tokens that fit; inputs fitted to noisy rows read less than others."""
    skipped = {"optimisation"} if view.public.noisy else set()
    fitting = suited(view, budget=budget)
    return [a for a in fitting if isinstance(a, TokenAttack) and a.name not in skipped]


def _behind_blocks(public: Public, others: list[list[int]], seconds: float) -> Public:
    """Return knowledge with the bottom's states of as many texts as there is time for.

    Texts of the owner's kind and public ones take turns.
    """
    begin, states, used = time.perf_counter(), [], []
    order = np.random.default_rng(0).permutation(len(public.public_ids))
    both = zip_longest(others, [public.public_ids[i] for i in order])
    texts = [ids for pair in both for ids in pair if ids is not None and len(ids) >= 2]
    for at in range(0, len(texts), _CHUNK):
        part = texts[at : at + _CHUNK]
        with torch.no_grad():
            states += represent(public.bottom, [torch.tensor(ids) for ids in part])
        used += part
        if time.perf_counter() - begin > seconds:
            break
    return Public(public.bottom, public.mechanism, used, touched=public.touched, states=states)


def _read(attack: TokenAttack, view: View, exposed: Exposed) -> Reading:
    begin, ids = time.perf_counter(), exposed.ids
    guesses = attack.read(view).ids
    seconds = time.perf_counter() - begin
    truth = _own(ids[: len(guesses)], ids)
    right = [g == t for g, t in zip(_own(guesses, ids), truth, strict=True)]
    correct = np.array([float(r.sum()) for r in right])
    total = np.array([float(len(r)) for r in right])
    scored = total > 0
    share = float(correct.sum() / max(1.0, total.sum()))
    low, high = clustered_interval(correct[scored], total[scored]) if scored.any() else (0.0, 1.0)
    other = _of_each_kind(torch.cat(truth), torch.cat(right))
    if exposed.own is not None:
        own = torch.cat(_own(exposed.own[: len(guesses)], ids))
        if bool(own.any()):
            other = max(other, float(torch.cat(right)[own].double().mean()))
    if other > share:  # what is read is not what is sent most, or not what the tokenizer put in
        share, high = other, max(high, other)
    return Reading(attack.name, share, low, high, int(total.sum()), seconds)


def _of_each_kind(truth: Tensor, right: Tensor) -> float:
    """Return the mean, over the different tokens, of the share of each that was read."""
    if not len(truth):
        return 0.0
    _, which, counts = np.unique(truth.numpy(), return_inverse=True, return_counts=True)
    hits = np.bincount(which, weights=right.double().numpy(), minlength=len(counts))
    return float((hits / counts).mean())


def _own(rows: Sequence[Tensor], ids: Sequence[Tensor]) -> list[Tensor]:
    """Return each text's own positions: without the tokens at either end that all texts share."""
    shortest = min(len(x) for x in ids)
    before = 0
    while len(ids) > 1 and before < shortest and len({int(x[before]) for x in ids}) == 1:
        before += 1
    after = 0
    while len(ids) > 1 and before + after < shortest:
        if len({int(x[-1 - after]) for x in ids}) > 1:
            break
        after += 1
    return [x[before : len(x) - after] for x in rows]
