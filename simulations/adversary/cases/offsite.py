"""Case 8: offsite tuning, where a single owner's update is a text.

One block, one step: the update of the first value projection is a sum of outer products with the
normalised inputs of that block, so its row space holds exactly the embeddings that were there; with
learned positions each tells its place.  The last token, of which no later one learns, is told by
the reported loss.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsplit.emulators import EmulatorPlan, build_emulator
from fedsplit.emulators.files import save_emulator
from fedsplit.emulators.lm import lm_loss, logits_of
from simulations.adversary.context import Field, settings, share_row
from simulations.adversary.material import LANGUAGE, OPT, Corpus, tiny, word_tokenizer
from simulations.adversary.reading import Row, allowed
from simulations.adversary.server import RUNS, Taken, files_script
from simulations.adversary.victim import strict_policy

BLOCK = 16
WIDTH = 32
LR = 9.0  # the larger the step, the less its rounding hides


def play(field: Field) -> list[Row]:
    """Return what single updates tell, and how many leave under limits of one."""
    return [_update(field), _rounds(field)]


def long_texts(field: Field, count: int) -> Corpus:
    """Return texts of several blocks each."""
    found = field.corpus(8 * count)
    texts = [" ".join(found.texts[8 * i : 8 * i + 8]) for i in range(count)]
    return Corpus(texts, found.labels[:count], found.public, found.real)


def emulator(folder: Path, tokenizer: Any) -> tuple[Any, str, dict[str, bytes]]:
    """Return an emulator whose first block is trained, its digest, and its files."""
    model = tiny(tokenizer, task=LANGUAGE, family=OPT, width=WIDTH, word_embed_proj_dim=WIDTH)
    with torch.no_grad():  # even attention: every position's value has its part in the loss
        for name in ("q_proj.weight", "q_proj.bias"):
            model.get_parameter(f"model.decoder.layers.0.self_attn.{name}").zero_()
    made = build_emulator(model, EmulatorPlan(("adapter", "keep")))
    saved = save_emulator(made, folder / "emulator", tokenizer, verify=False)
    files = {path.name: path.read_bytes() for path in saved.folder.iterdir()}
    return made.model.eval(), saved.digest, files


def offsite_settings(**more: Any) -> dict[str, Any]:
    """Return a run config of one step on one block, without anything that blurs it."""
    return settings(
        strategy="offsite-tuning",
        model__task=LANGUAGE,
        offsite__block=BLOCK,
        train__batch_size=1,
        train__max_steps=1,
        train__optimizer="sgd",
        train__schedule="constant",
        train__warmup=0.0,
        train__weight_decay=0.0,
        train__clip=0.0,
        train__lr=LR,
        **more,
    )


def _update(field: Field) -> Row:
    texts = long_texts(field, 12)
    tokenizer = word_tokenizer(texts.words)
    model, digest, files = emulator(field.new_folder("emulator"), tokenizer)
    policy = strict_policy(app__strategies=["offsite-tuning"])
    victim = field.victim(texts, policy)
    stream = [i for t in texts.texts for i in tokenizer(t)["input_ids"]]
    right = total = chance = 0
    sessions = []
    generator = random.Random(0)
    for number in range(1, 4 if field.quick else 13):
        taken = field.server.session(
            victim,
            offsite_settings(train__rounds=20),
            files_script(files),
            digest=digest,
            round=number,
        )
        sessions.append(taken)
        total += BLOCK
        chance += _aligned(generator.choices(stream, k=BLOCK), stream)
        if taken.weights:
            right += _aligned(_read(model, taken), stream)
    read = right / total
    share = share_row(8, "one block, one step", read, 0.0, total, "tokens", sessions)
    allowance = allowed(policy, "tokens", chance / total, total)
    return Row(8, share.variant, read, allowance, total, "tokens", share.left, share.told)


def _aligned(guess: Sequence[int], stream: Sequence[int]) -> int:
    """Return how many of the guesses are right at the place in the owner's text that fits best."""
    places = range(len(stream) - len(guess) + 1)
    return max(sum(a == b for a, b in zip(guess, stream[i:], strict=False)) for i in places)


@torch.no_grad()
def _read(model: Any, taken: Taken) -> list[int]:
    """Return the block that a round's update and loss tell."""
    name = next(n for n in taken.weights if n.endswith("v_proj.weight"))
    before = model.get_parameter(name)
    change = (taken.weights[name] - before).double()  # (d, d): sum of outer products
    _, values, basis = torch.linalg.svd(change)
    basis = basis[values > 3e-7 * values[0]]  # (r, d), r < T
    tokens = []
    for position in range(BLOCK - 1):
        inputs = _inputs(model, position)  # (V, d)
        inside = (inputs @ basis.T).norm(dim=1) / inputs.norm(dim=1)
        tokens.append(int(inside.argmax()))
    vocabulary = len(model.get_input_embeddings().weight)
    ids = torch.tensor(tokens).repeat(vocabulary, 1)
    ids = torch.cat([ids, torch.arange(vocabulary)[:, None]], dim=1)  # (V, T)
    losses = torch.cat([_losses(model, part) for part in torch.split(ids, 256)])
    return [*tokens, int((losses - taken.metrics.get("loss", 0.0)).abs().argmin())]


def _losses(model: Any, ids: Tensor) -> Tensor:
    """Return the mean loss of each row of ids (B, T) in nats, (B,)."""
    every = lm_loss(logits_of(model, ids), ids, "none")  # (B (T - 1),)
    return every.view(len(ids), -1).mean(1)


def _inputs(model: Any, position: int) -> Tensor:
    """Return what the first attention reads for every token at a position, (V, d) float64."""
    decoder = model.model.decoder
    place = decoder.embed_positions.weight[position + 2]  # OPT counts from two
    normalise = decoder.layers[0].self_attn_layer_norm
    found: Tensor = normalise(decoder.embed_tokens.weight + place).double()
    return found


def _rounds(field: Field) -> Row:
    """The same round of one run again and again, under limits of one session, epoch and round."""
    many = 20 if field.quick else 120
    texts = long_texts(field, 12)
    tokenizer = word_tokenizer(texts.words)
    _, digest, files = emulator(field.new_folder("emulator"), tokenizer)
    limits = {
        f"budget__{rule}": 1
        for rule in (
            *("rounds", "epochs_per_run", "epochs_per_bottom"),
            *("sessions_per_run", "sessions_per_day"),
        )
    }
    victim = field.victim(texts, strict_policy(app__strategies=["offsite-tuning"], **limits))
    run = next(RUNS)
    sessions = [
        field.server.session(
            victim,
            offsite_settings(seed=seed),
            files_script(files),
            digest=digest,
            run=run,
        )
        for seed in range(many)
    ]
    answered = sum(bool(taken.weights) for taken in sessions)
    read = max(0, answered - 1) / (many - 1)
    return share_row(8, "rounds beyond every limit", read, 0.0, many - 1, "rounds", sessions)


__all__ = ["emulator", "long_texts", "offsite_settings", "play"]
