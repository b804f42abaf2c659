"""Reading what the server received, and measuring attacks on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fedsplit.attacks.nearest import NearestNeighbour
from fedsplit.attacks.scoring import score_tokens
from fedsplit.config import RunConfig
from fedsplit.errors import AttackError
from fedsplit.models.halves import split
from fedsplit.privacy.candidates import candidates_through
from fedsplit.seeding import numpy_generator
from simulations.shares import OwnerShare
from strategies.split_tuning_run import load_base


def read_transcript(path: Path) -> dict[tuple[str, str], dict[int, Tensor]]:
    """Return (owner, split) -> slot -> (T, d) float32 of one run's transcript.

    Raises:
        AttackError: if there is no transcript.
    """
    if not path.exists():
        raise AttackError(f"{path}: no transcript; run with output.transcript = true")
    out: dict[tuple[str, str], dict[int, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        keys = set(file.keys())
        for key in sorted(k for k in keys if k.endswith("/rows")):
            owner, part, _ = key.split("/")
            lengths = file.get_tensor(f"{owner}/{part}/lengths").tolist()
            slots = file.get_tensor(f"{owner}/{part}/slots").tolist()
            rows = torch.split(file.get_tensor(key).float(), lengths)
            out[owner, part] = dict(zip(slots, rows, strict=True))
    return out


def embedding_inversion(
    config: RunConfig,
    transcript: Path,
    shares: list[OwnerShare],
    special_ids: set[int],
    *,
    samples: int = 400,
) -> dict[str, Any]:
    """Run the nearest-neighbour attack on what really left and score it.

    Args:
        config: the run's settings; the bottom must be of embeddings only (k = 0).
        transcript: the server's recording.
        shares: the truth, used for scoring alone.
        special_ids: ids that are not scored.
        samples: samples attacked at most, drawn over all owners by the run's seed.

    Raises:
        AttackError: no transcript, or a bottom with blocks (this attack has no candidates then).
    """
    if config.split.k != 0:
        raise AttackError(f"split.k={config.split.k}: must be 0 for nearest-neighbour inversion")
    received = read_transcript(transcript)
    truth = {(s.name, "train"): s.train for s in shares} | {
        (s.name, "test"): s.test for s in shares
    }
    pool = [(key, slot) for key, held in sorted(received.items()) for slot in sorted(held)]
    order = numpy_generator(config.seed, "attack").permutation(len(pool))[:samples]
    chosen = [pool[i] for i in sorted(order)]
    bottom, _ = split(load_base(config).model, 0, verify=False)
    rows = [received[key][slot] for key, slot in chosen]
    ids = [truth[key].ids[slot] for key, slot in chosen]
    candidates = candidates_through(bottom, bottom.vocab, max(r.shape[0] for r in rows))
    attack = NearestNeighbour()
    result = score_tokens(
        attack.name,
        attack.invert(rows, candidates),
        ids,
        special_ids=special_ids,
        knowledge=attack.knowledge,
    )
    return result.to_dict()
