"""Reading what the server received, and measuring attacks on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fedsplit.attacks.map_inversion import MapInversion
from fedsplit.attacks.nearest import NearestNeighbour
from fedsplit.attacks.scoring import score_tokens
from fedsplit.config import RunConfig
from fedsplit.errors import AttackError
from fedsplit.models.halves import split
from fedsplit.privacy.candidates import candidates_through
from fedsplit.privacy.configured import build_mechanism
from fedsplit.seeding import numpy_generator
from simulations.shares import OwnerShare
from strategies.denoising import public_log_prior
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
    *,
    samples: int = 400,
) -> dict[str, dict[str, Any]]:
    """Run the inversion attacks for k = 0 on what really left, and score them.

    Args:
        config: the run's settings; the bottom must be of embeddings only (k = 0).
        transcript: the server's recording.
        shares: the truth, used for scoring alone.
        samples: samples attacked at most, drawn over all owners by the run's seed.

    Returns:
        ``embedding_inversion``: the nearest neighbour, which knows nothing of the noise, and (with
        noise) ``map_inversion``: the most probable token given the noise's law and a public prior.

    Raises:
        AttackError: no transcript, or a bottom with blocks (there are no candidates then).
    """
    if config.split.k != 0:
        raise AttackError(f"split.k={config.split.k}: must be 0 for these attacks")
    received = read_transcript(transcript)
    truth = {(s.name, "train"): s.train for s in shares} | {
        (s.name, "test"): s.test for s in shares
    }
    pool = [(key, slot) for key, held in sorted(received.items()) for slot in sorted(held)]
    order = numpy_generator(config.seed, "attack").permutation(len(pool))[:samples]
    chosen = [pool[i] for i in sorted(order)]
    rows = [received[key][slot] for key, slot in chosen]
    ids = [truth[key].ids[slot] for key, slot in chosen]

    loaded = load_base(config)
    special = {int(i) for i in loaded.tokenizer.all_special_ids}
    bottom, _ = split(loaded.model, 0, verify=False)
    candidates = candidates_through(bottom, bottom.vocab, max(r.shape[0] for r in rows))
    nearest = NearestNeighbour()
    found = {
        "embedding_inversion": score_tokens(
            nearest.name,
            nearest.invert(rows, candidates),
            ids,
            special_ids=special,
            knowledge=nearest.knowledge,
        ).to_dict()
    }
    mechanism = build_mechanism(config.privacy, bottom, bottom.vocab)
    if mechanism.name != "none":
        prior = public_log_prior(loaded.tokenizer, bottom.vocab, config.model.max_tokens)
        informed = MapInversion()
        found["map_inversion"] = score_tokens(
            informed.name,
            informed.invert(rows, candidates, mechanism, prior),
            ids,
            special_ids=special,
            knowledge=informed.knowledge,
        ).to_dict()
    return found
