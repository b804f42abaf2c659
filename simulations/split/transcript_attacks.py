"""Reading what the server received, and measuring attacks on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsplit.attacks import ATTACKS, Truth, suited
from fedsplit.attacks.files import Budget, public_knowledge, recorded_view
from fedsplit.attacks.transcripts import (
    TRUTH,
    Samples,
    read_whole_transcript,
    write_truth,
)
from fedsplit.config import RunConfig
from fedsplit.owners.samples import Samples as PartSamples
from simulations.core.owner_samples import OwnerSamples


def truth_of(owners: Sequence[OwnerSamples]) -> Samples:
    """Return what only the experimenter knows: (owner, split) -> slot -> token ids."""
    return {key: dict(enumerate(held.ids)) for key, held in _parts(owners)}


def _parts(owners: Sequence[OwnerSamples]) -> list[tuple[tuple[str, str], PartSamples]]:
    return [((s.name, name), part) for s in owners for name, part in s.parts().items()]


def write_truth_file(folder: Path, owners: Sequence[OwnerSamples]) -> Path:
    """Write ``truth.safetensors``, which ``fedsplit attack inversion FOLDER`` scores against."""
    labels = {
        key: dict(enumerate(classes.tolist()))
        for key, held in _parts(owners)
        if (classes := held.classes) is not None
    }
    write_truth(folder / TRUTH, truth_of(owners), labels)
    return folder / TRUTH


FORWARD = frozenset(
    row.result_key or row.name for row in ATTACKS.values() if "steps" not in (*row.needs, *row.uses)
)
"""Attackers that read nothing but representations."""


def strongest(attacks: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the attacker that leaves least hidden; the first of equals."""
    return min(attacks, key=lambda name: attacks[name]["empirical_privacy"])


def summary_of(attacks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the strongest attacker over everything that crossed leaves hidden, named.

    The strongest of those that read representations alone stands beside it.
    """
    if not attacks:
        return {}
    forward = {name: found for name, found in attacks.items() if name in FORWARD}
    told = {"strongest": attacks, "strongest_forward": forward}
    shown = ("empirical_privacy", "interval", "text_recovery", "guess")
    found = {}
    for key, those in told.items():
        if those:
            name = strongest(those)
            found[key] = {"attacker": name} | {k: those[name].get(k) for k in shown}
    return found


def attack_transcript(
    config: RunConfig,
    transcript: Path,
    owners: Sequence[OwnerSamples],
    *,
    samples: int = 400,
    public: str = "",
    budget: Budget | None = None,
) -> dict[str, dict[str, Any]]:
    """Run every attack on tokens that fits what crossed, either way, and score them.

    Args:
        config: the run's settings; the attacker knows them, the initial bottom, and public text.
        transcript: the server's recording.
        owners: the truth, used for scoring alone.
        samples: samples attacked at most, drawn over all owners by the run's seed.
        public: the attacker's text, one per line; empty: the run's own, or the interpreter's.
        budget: what the attackers may spend.

    Returns:
        Per attack (its ``result_key``) its result: at k = 0 of the nearest neighbour and, with
        noise, of those that know its distribution and the language; with blocks of optimisation
        and of the learned inverter; of a language model those that read gradients.

    Raises:
        AttackError: no transcript.
    """
    recorded = read_whole_transcript(transcript)
    view, ids = recorded_view(recorded, truth_of(owners), samples, config.seed)
    view.public = public_knowledge(config, public=public)
    return {
        attack.result_key or attack.name: attack.run(view, Truth(ids=ids)).to_dict()
        for attack in suited(view, config.seed, budget)
        if attack.reads == "tokens"
    }
