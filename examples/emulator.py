"""An emulator built, tuned on an owner's text, and plugged into the full model.

    python examples/emulator.py

A small language model over bytes is trained on docstrings of one topic: it stands for the model
owner's model.  An owner gets a smaller emulator, tunes its adapter blocks on another topic, and the
full model with the tuned blocks plugged in predicts that topic better than before.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fedsplit.data import load_dataset
from fedsplit.emulators import Material, adapter_state, ends, make_compressor, plug_in

T = 64


def windows(topic: int) -> Tensor:
    """Return the bytes of one topic's docstrings in rows, (N, T)."""
    data = load_dataset("docstrings", limit=3000)
    pairs = zip(data.texts, data.labels, strict=True)
    text = "\n\n".join(text for text, label in pairs if label == topic)
    ids = torch.tensor(list(text.encode()), dtype=torch.int64)
    return ids[: len(ids) // T * T].view(-1, T)


def loss_of(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Return the mean loss of a byte, in nats."""
    return model(input_ids=rows, labels=rows).loss


def train(model: LlamaForCausalLM, rows: Tensor, steps: int, lr: float) -> None:
    """Train what of ``model`` requires gradients."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=lr)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (12,))]
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    public, private = windows(0), windows(1)
    private, held_out = private[:-64], private[-64:]
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=6,
        num_attention_heads=4, max_position_embeddings=T, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    train(model, public, 80, 3e-3)  # the model owner's own work

    layerdrop = make_compressor("layerdrop", adapters=ends(6, 1, 1), keep=2)
    emulator = layerdrop.build(model, Material(tokens=public[:32]))  # what the owner is sent
    share = emulator.parameter_count() / model.num_parameters()
    print(f"emulator: {share:.0%} of the weights, {emulator.plan.adapters} are trained")

    train(emulator.model, private, 60, 1e-3)  # at the owner
    tuned = adapter_state(emulator)  # what the owner returns

    with torch.no_grad():
        before = loss_of(model, held_out).item()
        inside = loss_of(emulator.model, held_out).item()
        undo = plug_in(model, tuned, emulator.plan)
        after = loss_of(model, held_out).item()
        plug_in(model, undo, emulator.plan)
        restored = loss_of(model, held_out).item()
    print(f"held-out loss of the owner's topic: full model {before:.3f} nats a byte,")
    print(f"tuned emulator {inside:.3f}, full model with the tuned blocks plugged in {after:.3f}")
    assert after < before
    assert restored == before


if __name__ == "__main__":
    main()
