"""Case 2: bounds on medians, and rows that nobody clips.

The vocabulary is mostly filler words, which the mechanism and the policy measure; real words are
3,000 times longer, and the tokenizer puts more fillers than words into every text, so that the
median row of a batch is a filler as well.  Each mechanism is read by every attack on tokens that
fits what it sends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedsplit.attacks import Public, TokenAttack, View, suited
from fedsplit.config import RunConfig
from fedsplit.privacy.mechanisms.table import build_mechanism
from simulations.adversary.context import Field, settings, split_script, token_row, zeros
from simulations.adversary.material import directions, pack, tiny, word_tokenizer
from simulations.adversary.reading import Row, nearest, score
from simulations.adversary.victim import strict_policy

FACTOR = 3000.0
SPREAD = 8
WIDE = 1024
# mechanism -> its noise ratio and more of its settings
VARIANTS: dict[str, dict[str, Any]] = {
    "dchi": {"privacy__noise_ratio": 6.0},
    "nearest-token": {"privacy__noise_ratio": 6.0},
    "pac": {"privacy__noise_ratio": 20.0},
    "gaussian": {"privacy__noise_ratio": 6.0, "privacy__clip": 1e6},
    "shaped": {"privacy__noise_ratio": 6.0, "privacy__spare": 0.5},
}


def play(field: Field) -> list[Row]:
    """Return what each mechanism lets out of a vocabulary with long words, and of a wide one."""
    return [*(_long_words(field, name, more) for name, more in VARIANTS.items()), _wide(field)]


def _wide(field: Field) -> Row:
    """Vectors of 1,024 numbers: noise of the same length is thirty times less in each of them."""
    found = field.corpus(20)
    tokenizer = word_tokenizer(found.words)
    table = directions(len(tokenizer), WIDE)
    model = tiny(tokenizer, table=table, width=WIDE, layers=1, intermediate_size=64)
    bundle, _, _ = pack(model, 0, tokenizer)
    policy = strict_policy(noise__min_ratio=6.0)
    victim = field.victim(found, policy)
    flat = settings(
        privacy__mechanism="dchi",
        privacy__noise_ratio=6.0,
        labels__protection="randomised-response",
    )
    truth, _ = field.truth(victim, flat, bundle, table)
    taken = field.server.session(victim, flat, split_script(bundle, zeros(2)), digest=bundle.digest)
    guesses = {s: nearest(rows, table).tolist() for s, rows in taken.rows.items()}
    return token_row(2, "wide vectors", policy, guesses, truth, [taken])


def _long_words(field: Field, mechanism: str, more: dict[str, Any]) -> Row:
    found = field.corpus(18 if field.quick else 36)
    words = found.words
    # Real words have ids that the mechanism's even steps through the vocabulary never touch.
    even = (1024, 8192) if mechanism == "pac" else (1024,)
    size = max(even) + 3 * len(words)
    steps = {int(x) for n in even for x in torch.linspace(0, size - 1, n, dtype=torch.float64)}
    free = [i for i in range(10, size) if i not in steps][: len(words)]
    fillers = iter(f"~f{i}" for i in range(size))
    place = dict(zip(free, words, strict=False))
    listed = [place.get(i) or next(fillers) for i in range(3, size)]
    tokenizer = word_tokenizer(listed, spread=SPREAD)
    table = directions(len(tokenizer), 32)
    table[free] *= FACTOR
    bundle, bottom, _ = pack(tiny(tokenizer, table=table), 0, tokenizer)
    policy = strict_policy(noise__mechanisms=list(VARIANTS), noise__min_ratio=6.0)
    victim = field.victim(found, policy)
    flat = settings(
        privacy__mechanism=mechanism,
        labels__protection="randomised-response",
        model__max_tokens=128,
        privacy__task_words=f"{words[0]} {words[1]} | {words[2]} {words[3]}",
        **more,
    )
    truth, _ = field.truth(victim, flat, bundle, table)
    taken = field.server.session(victim, flat, split_script(bundle, zeros(2)), digest=bundle.digest)
    spread = [i for i in range(len(tokenizer)) if i not in place]
    guesses = {s: nearest(rows, table).tolist() for s, rows in taken.rows.items()}
    tried = [guesses]
    if taken.rows:
        config = RunConfig.from_flat(flat).privacy
        public = tokenizer(found.public, truncation=True, max_length=128)["input_ids"]
        law = build_mechanism(config, bottom, bottom.vocab, tokenizer)
        tried += _attacked(Public(bottom, law, public), taken.rows)
    best = max(tried, key=lambda each: score(each, truth, spread)[0])
    return token_row(2, mechanism, policy, best, truth, [taken], spread)


def _attacked(public: Public, rows: Mapping[int, Tensor]) -> list[dict[int, list[int]]]:
    """Return the guesses of every attack on tokens that fits."""
    slots = sorted(rows)
    view = View(public, [rows[slot] for slot in slots])
    attacks = [a for a in suited(view) if isinstance(a, TokenAttack)]
    return [dict(zip(slots, (x.tolist() for x in a.read(view).ids), strict=True)) for a in attacks]
