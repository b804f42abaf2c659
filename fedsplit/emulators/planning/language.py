"""Which way to tune a language model together meets an owner's floor, from measured runs.

``measured.json`` beside this file holds means over seeds of the experiment ``lm-frontier``, which
writes a file of that form: what one pass learned and what the strongest reader had right, by
protection and data.  Costs are computed for the model that is asked about; quality and privacy are
those of the model that was measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from fedsplit.emulators.planning.planner import Base
from fedsplit.errors import check
from fedsplit.registry import pick

FILE = "measured.json"
NOISY_BLOCKS = 3  # of the tails measured above noisy representations


@dataclass(frozen=True)
class Costs:
    """What a way to tune costs an owner.

    Attributes:
        up, down: numbers per token that cross, forth and back, in one pass.
        once: parameters sent to the owner before training.
        round: parameters sent each way after each round.
        flops: of the owner per token of training.
    """

    up: int
    down: int
    once: int
    round: int
    flops: int


@dataclass(frozen=True)
class Way:
    """A protection as the planner knows it.

    Attributes:
        settings: of a run, with ``{level:g}`` for the level.
        costs: (base, level) -> costs.
    """

    settings: str
    costs: Callable[[Base, float], Costs]


def _returned(base: Base, level: float) -> Costs:
    d, head = base.sizes.hidden, base.vocab * base.sizes.hidden
    return Costs(2 * d, d, base.outside, 0, 4 * head)  # embeddings and head; rows, gradients


def _tail(base: Base, blocks: float, *, leaves: bool) -> Costs:
    d, head = base.sizes.hidden, base.vocab * base.sizes.hidden
    tail = int(blocks) * base.sizes.block + head
    return Costs(d, d, base.outside + tail, tail if leaves else 0, 6 * tail)


def _offsite(base: Base, keep: float, adapted: int) -> Costs:
    block, head = base.sizes.block, base.vocab * base.sizes.hidden
    adapters, kept = adapted * block, int(keep) * block
    return Costs(0, 0, base.outside + adapters + kept, adapters, 6 * adapters + 4 * (kept + head))


_TAIL = "labels.protection=client-tail train.method=head labels.tail-blocks="
WAYS: dict[str, Way] = {
    "none": Way("labels.protection=client-head+none", _returned),
    "row-noise": Way(
        "labels.protection=client-head+row-noise labels.noise-ratio={level:g}", _returned
    ),
    "client-tail": Way(_TAIL + "{level:g}", lambda b, n: _tail(b, n, leaves=True)),
    "own-tail": Way(
        _TAIL + "{level:g} labels.tail-weights=own", lambda b, n: _tail(b, n, leaves=False)
    ),
    "noisy-tail": Way(
        f"{_TAIL}{NOISY_BLOCKS} labels.tail-weights=own privacy.mechanism=dchi "
        "privacy.noise-ratio={level:g} privacy.denoise=unigram",
        lambda b, _: _tail(b, NOISY_BLOCKS, leaves=False),
    ),
    "offsite": Way(
        "strategy=offsite-tuning offsite.adapters=4 offsite.keep={level:g}",
        lambda b, keep: _offsite(b, keep, 4),
    ),
    "offsite-6": Way(
        "strategy=offsite-tuning offsite.adapters=6 offsite.keep={level:g}",
        lambda b, keep: _offsite(b, keep, 6),
    ),
}


@dataclass(frozen=True)
class Answer:
    """One way to tune, for one model and one floor.

    Attributes:
        protection, level, settings: what it is, and how a run asks for it.
        data: that it was measured on; runs: how many.
        quality: share of the unprotected gain in one pass.
        privacy: 1 - share of tokens read by the strongest reader over everything that crosses.
        channel: the same over gradients and weights alone.
        guess: 1 - share that the reader has right without them.
        meets: whether ``privacy`` is at least the floor.
        costs: of an owner.
    """

    protection: str
    level: float
    settings: str
    data: str
    runs: int
    quality: float
    privacy: float
    channel: float
    guess: float
    meets: bool
    costs: Costs


@cache
def measured() -> tuple[Mapping[str, Any], ...]:
    """Return the measured rows that the package ships."""
    text = files("fedsplit.emulators.planning").joinpath(FILE).read_text(encoding="utf-8")
    return tuple(json.loads(text)["rows"])


def answers(
    base: Base, floor: float, rows: Sequence[Mapping[str, Any]] | None = None
) -> list[Answer]:
    """Return every measured way, those that meet the floor first, the best quality first of each.

    Args:
        base: from :func:`fedsplit.emulators.planning.planner.describe_base`.
        floor: least 1 - recovery over everything that crosses, a share.
        rows: measured ones; None: the package's.

    Raises:
        ConfigError: ``floor`` out of range.
    """
    check(0 <= floor <= 1, "floor", floor, "in [0, 1] (1 - share of tokens that is read)")
    found = []
    for row in measured() if rows is None else rows:
        way, level = pick(WAYS, row["protection"], "protection"), float(row["level"])
        found.append(
            Answer(
                protection=row["protection"],
                level=level,
                settings=way.settings.format(level=level),
                data=row["data"],
                runs=int(row["runs"]),
                quality=float(row["gain_share"]),
                privacy=1 - float(row["joint_recovery"]),
                channel=1 - float(row["token_recovery"]),
                guess=1 - float(row["guess"]),
                meets=1 - float(row["joint_recovery"]) >= floor,
                costs=way.costs(base, level),
            )
        )
    return sorted(found, key=lambda a: (not a.meets, -a.quality))
