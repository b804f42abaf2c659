"""Reading what the server received, and measuring attacks on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsplit.attacks import Truth, View, suited
from fedsplit.attacks.files import Budget, public_knowledge
from fedsplit.attacks.transcripts import (
    TRUTH,
    Samples,
    chosen_samples,
    read_transcript,
    write_truth,
)
from fedsplit.config import RunConfig
from simulations.core.owner_samples import OwnerSamples


def truth_of(owners: Sequence[OwnerSamples]) -> Samples:
    """Return what only the experimenter knows: (owner, split) -> slot -> token ids."""
    parts = [(s.name, part, getattr(s, part)) for s in owners for part in ("train", "test")]
    return {(name, part): dict(enumerate(held.ids)) for name, part, held in parts}


def labels_of(owners: Sequence[OwnerSamples]) -> dict[tuple[str, str], dict[int, int]]:
    """Return the private labels, where there are classes: (owner, split) -> slot -> label."""
    parts = [(s.name, part, getattr(s, part)) for s in owners for part in ("train", "test")]
    return {
        (name, part): dict(enumerate(held.labels.tolist()))
        for name, part, held in parts
        if held.labels is not None
    }


def write_truth_file(folder: Path, owners: Sequence[OwnerSamples]) -> Path:
    """Write ``truth.safetensors``, which ``fedsplit attack inversion FOLDER`` scores against."""
    path = folder / TRUTH
    write_truth(path, truth_of(owners), labels_of(owners))
    return path


def attack_transcript(
    config: RunConfig,
    transcript: Path,
    owners: Sequence[OwnerSamples],
    *,
    samples: int = 400,
    public: str = "",
    budget: Budget | None = None,
) -> dict[str, dict[str, Any]]:
    """Run every inversion attack that fits the split on what really left, and score them.

    Args:
        config: the run's settings; the attacker knows them, the initial bottom, and public text.
        transcript: the server's recording.
        owners: the truth, used for scoring alone.
        samples: samples attacked at most, drawn over all owners by the run's seed.
        public: the attacker's text, one per line; empty: the run's own public text, or what the
            interpreter ships.
        budget: what the attackers may spend.

    Returns:
        Per attack (its ``result_key``) its result.  At k = 0 ``embedding_inversion``, the nearest
        neighbour, which knows nothing of the noise, and with noise ``map_inversion`` and
        ``contextual_inversion``, which know its distribution and the language; with blocks
        ``optimisation_inversion`` and ``learned_inversion``.

    Raises:
        AttackError: no transcript.
    """
    rows, ids = chosen_samples(read_transcript(transcript), truth_of(owners), samples, config.seed)
    view = View(public=public_knowledge(config, public=public), rows=rows, seed=config.seed)
    return {
        attack.result_key: attack.run(view, Truth(ids=ids)).to_dict()
        for attack in suited(view, config.seed, budget)
    }
