"""Case 9: what DP-SGD costs, told anew for every run and added up nowhere."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedsplit.models.bundle.head import with_head
from fedsplit.models.splitting.heads import detach_head
from fedsplit.privacy.dp.accounting import spent_epsilon
from simulations.adversary.cases.offsite import emulator, long_texts, offsite_settings
from simulations.adversary.context import Field, settings, share_row, split_script, zeros
from simulations.adversary.material import directions, pack, tiny, word_tokenizer
from simulations.adversary.reading import Row
from simulations.adversary.server import Taken, files_script
from simulations.adversary.victim import Victim, strict_policy

RUNS = 6
NOISE, DELTA = 1.0, 1e-5
WIDTH = 32


def play(field: Field) -> list[Row]:
    """Return the share of the true cost of six trainings that nobody tells."""
    return [_head(field), _adapters(field)]


def _head(field: Field) -> Row:
    texts = field.corpus(40)
    tokenizer = word_tokenizer(texts.words)
    table = directions(len(tokenizer), WIDTH)
    bundle, _, top = pack(tiny(tokenizer, table=table), 0, tokenizer)
    whole = with_head(bundle, detach_head(top))
    victim = field.victim(texts, strict_policy())
    flat = settings(
        privacy__mechanism="dchi",
        privacy__noise_ratio=50.0,
        labels__protection="client-head",
        dp__noise_multiplier=NOISE,
        dp__delta=DELTA,
    )
    sessions = [
        field.server.session(victim, flat, split_script(whole, zeros(WIDTH)), digest=whole.digest)
        for _ in range(RUNS)
    ]
    return _row("own head, six runs", victim, sessions, 16 / 32)


def _adapters(field: Field) -> Row:
    texts = long_texts(field, 12)
    tokenizer = word_tokenizer(texts.words)
    _, digest, files = emulator(field.new_folder("emulator"), tokenizer)
    victim = field.victim(texts, strict_policy(app__strategies=["offsite-tuning"]))
    flat = offsite_settings(dp__noise_multiplier=NOISE, dp__delta=DELTA)
    sessions = [
        field.server.session(victim, flat, files_script(files), digest=digest) for _ in range(RUNS)
    ]
    blocks = max((taken.metrics.get("num-examples", 1.0) for taken in sessions), default=1.0)
    return _row("adapters, six runs", victim, sessions, 1 / max(1.0, blocks))


def _row(variant: str, victim: Victim, sessions: Sequence[Taken], rate: float) -> Row:
    """Return the share of the composed epsilon that neither reports nor the ledger tell.

    Args:
        variant: of the case.
        victim: the owner.
        sessions: all of its runs.
        rate: batch size / samples.
    """
    steps = int(sum(taken.metrics.get("dp-steps", 0.0) for taken in sessions))
    true = spent_epsilon(NOISE, rate, steps, DELTA)
    told = [taken.metrics.get("dp-epsilon", 0.0) for taken in sessions]
    kept = re.findall(
        r'"[a-z_.-]*dp[a-z_.-]*epsilon[a-z_.-]*":\s*([0-9.e+-]+)', victim.ledger_text()
    )
    known = max([*told, *map(float, kept)], default=0.0)
    untold = max(0.0, 1 - known / true) if true else 0.0
    return share_row(9, variant, untold, 0.01, RUNS, "runs", list(sessions))
