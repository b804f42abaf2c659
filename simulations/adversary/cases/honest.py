"""An honest session under the strict policy: it must go through, or the other rows say nothing."""

from __future__ import annotations

from simulations.adversary.context import Field, settings, share_row, split_script, token_row, zeros
from simulations.adversary.material import directions, pack, tiny, word_tokenizer
from simulations.adversary.reading import Row, nearest
from simulations.adversary.victim import strict_policy


def play(field: Field) -> list[Row]:
    """Return how much of the texts an honest session at heavy noise lets out, and that it runs."""
    texts = field.corpus(40)
    tokenizer = word_tokenizer(texts.words)
    table = directions(len(tokenizer), 32)
    bundle, _, _ = pack(tiny(tokenizer, table=table), 0, tokenizer)
    policy = strict_policy()
    victim = field.victim(texts, policy)
    flat = settings(
        privacy__mechanism="dchi",
        privacy__noise_ratio=50.0,
        labels__protection="randomised-response",
    )
    truth, _ = field.truth(victim, flat, bundle, table)
    taken = field.server.session(victim, flat, split_script(bundle, zeros(2)), digest=bundle.digest)
    guesses = {s: nearest(rows, table).tolist() for s, rows in taken.rows.items()}
    missing = 1 - len(taken.rows) / len(truth)
    return [
        token_row(0, "noise ratio 50", policy, guesses, truth, [taken]),
        share_row(0, "texts refused", missing, 0.0, len(truth), "texts", [taken]),
    ]
