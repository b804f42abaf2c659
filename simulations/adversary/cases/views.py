"""Case 4: more noises of one text than the policy's budget of views.

A text is known by its token ids, so whatever changes the ids buys new noise for the same words; and
modes other than ``train`` and ``evaluate`` have rules of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from simulations.adversary.context import (
    Field,
    settings,
    share_row,
    split_script,
    token_row,
    zeros,
)
from simulations.adversary.material import directions, pack, tiny, with_file, word_tokenizer
from simulations.adversary.reading import Row, average, nearest
from simulations.adversary.server import Taken
from simulations.adversary.victim import strict_policy

WIDTH = 64
VIEWS = {"budget__views_per_bottom": 1, "budget__views_total": 1}


def play(field: Field) -> list[Row]:
    """Return what each way around the budget of views reads."""
    return [
        *_special_tokens(field),
        _cuts(field),
        _held_out(field),
        _predict(field),
    ]


def _noise(ratio: float, **more: Any) -> dict[str, Any]:
    return settings(
        privacy__mechanism="dchi",
        privacy__noise_ratio=ratio,
        labels__protection="randomised-response",
        **more,
    )


def _read(sessions: Sequence[Taken], table: Tensor, skip: int = 0) -> dict[int, list[int]]:
    """Return the nearest token of each position's mean over all sessions.

    Args:
        sessions: whose rows are averaged.
        table: public vectors.
        skip: tokens at the end of each text that are the tokenizer's.
    """
    views = []
    for taken in sessions:
        views.append({s: rows[: len(rows) - skip] for s, rows in taken.rows.items()})
    return {slot: nearest(rows, table).tolist() for slot, rows in average(views).items()}


def _special_tokens(field: Field) -> list[Row]:
    """Tokenizers that end every text with another token of their own."""
    many = 20 if field.quick else 90
    texts = field.corpus(16 if field.quick else 40)
    ends = [f"[E{i}]" for i in range(many)]
    policy = strict_policy(**VIEWS)
    victim = field.victim(texts, policy)
    flat = _noise(8.0 if field.quick else 12.0)
    listed = [*ends, *texts.words]
    plain = word_tokenizer(listed)
    table = directions(len(plain), WIDTH)
    bundle, _, _ = pack(tiny(plain, table=table, width=WIDTH), 0, plain)
    truth, _ = field.truth(victim, flat, bundle, table)
    sessions = []
    for end in ends:
        ended = word_tokenizer(listed, after=[end]).backend_tokenizer.to_str().encode()
        changed = with_file(bundle, "tokenizer.json", ended)
        sessions.append(
            field.server.session(
                victim, flat, split_script(changed, zeros(2)), digest=changed.digest
            )
        )
    once = token_row(4, "one session", policy, _read(sessions[:1], table, 1), truth, sessions[:1])
    whole = token_row(4, "other special tokens", policy, _read(sessions, table, 1), truth, sessions)
    return [once, whole]


def _cuts(field: Field) -> Row:
    """``model.max-tokens`` varied over evaluations, with the one bottom that the owner allows."""
    texts = field.corpus(60 if field.quick else 120)
    tokenizer = word_tokenizer(texts.words)
    table = directions(len(tokenizer), WIDTH)
    bundle, _, _ = pack(tiny(tokenizer, table=table, width=WIDTH), 0, tokenizer)
    policy = strict_policy(**VIEWS, model__bottoms=[bundle.digest])
    victim = field.victim(texts, policy)
    flat = _noise(4.0)
    truth, _ = field.truth(victim, flat, bundle, table, "evaluate")
    longest = max(map(len, truth.values()))
    sessions = [
        field.server.session(
            victim,
            flat | {"model.max-tokens": cut},
            split_script(bundle, zeros(2)),
            digest=bundle.digest,
            kind="evaluate",
        )
        for cut in range(2, longest + 1)
    ]
    return token_row(4, "other cuts", policy, _read(sessions, table), truth, sessions)


def _held_out(field: Field) -> Row:
    """The server's share of held-out texts and its seed choose what no epoch counts."""
    texts = field.corpus(40)
    tokenizer = word_tokenizer(texts.words)
    table = directions(len(tokenizer), WIDTH)
    bundle, _, _ = pack(tiny(tokenizer, table=table, width=WIDTH), 0, tokenizer)
    policy = strict_policy(budget__epochs_per_run=0.01, budget__epochs_per_bottom=0.01)
    victim = field.victim(texts, policy)
    sessions, seen = [], set()
    for seed in range(3):
        flat = _noise(50.0, data__test_share=0.9, seed=seed, train__max_steps=1)
        bare = flat | {"privacy.noise-ratio": 0.0}
        truth, _ = field.truth(victim, bare, bundle, table, "evaluate")
        taken = field.server.session(
            victim, flat, split_script(bundle, zeros(2)), digest=bundle.digest, kind="evaluate"
        )
        sessions.append(taken)
        seen |= {tuple(truth[slot]) for slot in taken.rows}
    total = len(set(texts.texts))
    read = len(seen) / total
    return share_row(4, "held-out texts chosen", read, 0.2, total, "texts", sessions)


def _predict(field: Field) -> Row:
    """A TRAIN message whose offer says ``predict``, of a joint bottom: new noise in every round."""
    many = 8 if field.quick else 18
    texts = field.corpus(60)
    tokenizer = word_tokenizer(texts.words)
    table = directions(len(tokenizer), WIDTH)
    bundle, _, _ = pack(tiny(tokenizer, table=table, width=WIDTH), 0, tokenizer)
    policy = strict_policy(**VIEWS, model__bottom=["frozen", "joint"])
    victim = field.victim(texts, policy)
    flat = _noise(5.0, split__bottom="joint")
    truth, _ = field.truth(victim, flat, bundle, table, "evaluate")
    sessions = [
        field.server.session(
            victim,
            flat,
            split_script(bundle, zeros(2)),
            digest=bundle.digest,
            mode="predict",
            round=number,
        )
        for number in range(1, many + 1)
    ]
    return token_row(4, "mode predict", policy, _read(sessions, table), truth, sessions)
