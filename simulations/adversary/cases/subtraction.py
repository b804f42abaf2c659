"""Case 1: noise cancels where a text's representation depends on more than the text.

A LLaMA with ``rope_type = "dynamic"``, unmodified, computes other rotary frequencies for a batch of
other width, and remembers the widest one.  The noise belongs to the text, so two sends of one text
differ by exactly the difference of its representations, which only its own tokens cause.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedsplit.models.splitting.halves import Bottom
from simulations.adversary.context import Field, settings, split_script, token_row, zeros
from simulations.adversary.material import corpus, directions, pack, tiny, word_tokenizer
from simulations.adversary.reading import Row
from simulations.adversary.victim import strict_policy

FIRST = "[S]"  # every text begins with it


def play(field: Field) -> list[Row]:
    """Return what the same texts in other batches, and in another order, tell."""
    alone, together = {"train.batch-size": 1}, {"train.batch-size": 512}
    rounds = range(1, 5 if field.quick else 13)
    bound = 48 if field.real else 16  # as long as nearly all texts
    return [
        _subtract(field, "width of the batch", bound, [(alone, 1), (together, 1)]),
        _subtract(field, "order of single texts", 17, [(alone, n) for n in rounds], joined=3),
    ]


def _subtract(
    field: Field,
    variant: str,
    bound: int,
    asked: Sequence[tuple[dict[str, Any], int]],
    joined: int = 1,
) -> Row:
    """Play sessions of other settings and rounds, and read each text from two of its sends.

    Args:
        field: where.
        variant: its name in the row.
        bound: tokens; wider batches get other frequencies.
        asked: changed settings and round of each session.
        joined: sentences of one text.
    """
    count = (8 if field.quick else 14) * joined
    found = corpus(count, real=field.real and joined == 1)
    for at in range(len(found.texts) // joined):
        found.texts[at] = " ".join(found.texts[joined * at : joined * (at + 1)])
    del found.texts[len(found.texts) // joined :], found.labels[len(found.texts) :]
    found.texts[0] = " ".join(found.words[: bound + 4 if joined == 1 else 60])  # a long one
    tokenizer = word_tokenizer(found.words, before=[FIRST])
    table = directions(len(tokenizer), 32)
    rope = {"rope_type": "dynamic", "factor": 64.0, "rope_theta": 100.0}
    bundle, bottom, _ = pack(
        tiny(tokenizer, table=table, max_position_embeddings=bound, rope_parameters=rope),
        1,
        tokenizer,
    )
    plain, _, _ = pack(tiny(tokenizer, table=table), 0, tokenizer)
    policy = strict_policy(budget__views_per_bottom=1, budget__views_total=1)
    victim = field.victim(found, policy)
    flat = settings(
        privacy__mechanism="dchi",
        privacy__eta=32 / 150,  # fifty times as long as what it hides, or more
        labels__protection="randomised-response",
        split__k=1,
        train__rounds=len(asked),
    )
    truth, _ = field.truth(victim, flat, plain, table)
    sessions = [
        field.server.session(
            victim,
            flat | change,
            split_script(bundle, zeros(2)),
            digest=bundle.digest,
            round=number,
        )
        for change, number in asked
    ]
    sends: dict[int, dict[int, Tensor]] = {}  # slot -> sequence length -> rows
    for taken in sessions:
        for slot, length in _frequencies(taken.slots, taken.rows, bound).items():
            sends.setdefault(slot, {})[length] = taken.rows[slot].double()
    guesses = {}
    for slot, by_length in sends.items():
        low, high = min(by_length), max(by_length)
        if low < high:
            guesses[slot] = _read(bottom, by_length[low] - by_length[high], low, high)
    return token_row(1, variant, policy, guesses, truth, sessions, (0, 1, 2))


def _frequencies(
    slots: Mapping[int, list[int]], rows: Mapping[int, Tensor], bound: int
) -> dict[int, int]:
    """Return, per slot, the sequence length whose frequencies its batch got."""
    known, found = bound, {}
    for step in sorted(slots):
        here = [s for s in slots[step] if s in rows]
        width = max((len(rows[s]) for s in here), default=0)
        known = bound if width < bound else max(known, width)
        found.update(dict.fromkeys(here, known))
    return found


@torch.no_grad()
def _read(bottom: Bottom, difference: Tensor, low: int, high: int) -> list[int]:
    """Return the tokens that cause ``difference``, one position after the other.

    Args:
        bottom: the server's own copy.
        difference: (T, d) of the text's two sends.
        low: sequence length whose frequencies the first was computed with.
        high: the second's.
    """
    tokens = [2]
    for at in range(1, len(difference)):
        ids = torch.tensor(tokens).repeat(bottom.vocab, 1)
        ids = torch.cat([ids, torch.arange(bottom.vocab)[:, None]], dim=1)  # (V, at + 1)
        made = [_computed(bottom, ids, length)[:, at].double() for length in (low, high)]
        tokens.append(int((made[0] - made[1] - difference[at]).norm(dim=1).argmin()))
    return tokens


def _computed(bottom: Bottom, ids: Tensor, length: int) -> Tensor:
    """Return the bottom's output (V, T, d) with the frequencies of a batch of that length."""
    one = torch.zeros(1, 1, dtype=torch.int64)
    bottom(one, torch.ones_like(one))  # shorter than the bound: what it remembered is gone
    rest = length - ids.shape[1]
    padded = torch.nn.functional.pad(ids[:1], (0, max(0, rest)))
    rotary: Any = bottom.model.rotary_emb
    rotary(torch.zeros(1), torch.arange(padded.shape[1])[None])
    frequencies = rotary.inv_freq.clone()
    bound, rotary.original_max_seq_len = rotary.original_max_seq_len, 0
    rotary.max_seq_len_cached, rotary.inv_freq = 1 << 20, frequencies
    try:
        hidden: Tensor = bottom(ids, torch.ones_like(ids))
        return hidden
    finally:
        rotary.original_max_seq_len = rotary.max_seq_len_cached = bound
        rotary.inv_freq = rotary.original_inv_freq
