"""A trial measures what it says, and ScaleOT's case holds on the real small model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fedsplit.emulators import Material, make_compressor
from fedsplit.emulators.lm import IGNORED, LabelledBlocks, mean_loss, pack, perplexity
from fedsplit.emulators.planning.trial import (
    Tuning,
    fully_tuned,
    loss_of,
    trial,
    tune,
    tuned_in_full,
)
from fedsplit.errors import ConfigError, DataError
from tests.emulators.emulator_families import tiny, tokens

SHORT = Tuning(steps=6, batch_size=6, lr=3e-3)


def test_nothing_compressed_is_the_bound_itself() -> None:
    model = tiny()
    before = {n: p.clone() for n, p in model.named_parameters()}
    start = mean_loss(model, tokens())
    identity = make_compressor("layerdrop", adapters=(0, 5))

    row, emulator = trial(model, identity, Material(), tokens(), tokens(), SHORT)

    assert row.full_zero_shot == row.emulator_zero_shot == start
    assert row.plug_in == row.emulator_ft == row.adapters_in_full < start
    assert row.closed == 1.0
    assert not row.valid  # the owner has as good a model
    assert row.adapters == emulator.plan.adapters == (0, 5)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_compressed_trial() -> None:
    compressor = make_compressor("layerdrop", adapters=(0, 5), keep=1)
    told: list[int] = []
    row, _ = trial(
        tiny(),
        compressor,
        Material(),
        tokens(),
        tokens(),
        SHORT,
        bound=math.nan,
        progress=lambda step, loss: told.append(step),
    )
    assert row.emulator_ft < row.emulator_zero_shot
    assert row.plug_in != row.emulator_ft
    assert math.isnan(row.adapters_in_full)
    assert told == [1, 2, 3, 4, 5, 6]


def test_full_tuning_beats_a_part_of_it() -> None:
    model = tiny()
    part = tuned_in_full(model, (0,), tokens(), tokens(), SHORT)
    assert fully_tuned(model, tokens(), tokens(), SHORT) < part < mean_loss(model, tokens())


def test_half_precision_tuning_learns_too() -> None:
    model = tiny()
    settings = Tuning(steps=6, batch_size=6, lr=3e-3, bf16=True)
    assert tuned_in_full(model, (0,), tokens(), tokens(), settings) < mean_loss(model, tokens())


def test_blocks_and_perplexity() -> None:
    assert pack(torch.arange(10), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(DataError, match="ids: 3 tokens: must be >= 4"):
        pack(torch.arange(3), 4)
    model = tiny()
    loss = model(input_ids=tokens(), labels=tokens()).loss.detach()
    assert perplexity(model, tokens(), 5) == pytest.approx(float(loss.exp()), rel=1e-4)
    with pytest.raises(ConfigError, match="steps=0"):
        Tuning(steps=0)


def test_blocks_with_every_label_are_their_tokens() -> None:
    whole = LabelledBlocks(tokens(), tokens().clone())
    make = make_compressor("layerdrop", adapters=(0, 5), keep=1)
    plain, _ = trial(tiny(), make, Material(), tokens(), tokens(), SHORT)
    labelled, _ = trial(tiny(), make, Material(), whole, whole, SHORT)
    assert replace(labelled, build_s=plain.build_s) == plain


def test_labels_alone_are_learned_and_measured() -> None:
    ids, model = tokens(), tiny()
    labels = ids.clone()
    labels[:, :7] = IGNORED
    blocks = LabelledBlocks(ids, labels)
    assert blocks.targets() == 3 * len(ids)
    logits = model(input_ids=ids).logits[:, 6:-1].detach()  # what predicts tokens 7, 8 and 9
    alone = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 7:].flatten())
    assert loss_of(model, blocks) == pytest.approx(float(alone), rel=1e-5)
    one = Tuning(steps=1, batch_size=len(ids), lr=1e-3)
    parameters = list(model.requires_grad_(True).parameters())
    assert tune(model, parameters, blocks, one)[0] == pytest.approx(float(alone), rel=1e-5)


def test_blocks_without_a_label_are_refused() -> None:
    labels = tokens().clone()
    labels[3] = IGNORED
    labels[5, 1:] = IGNORED  # the first token follows nothing
    with pytest.raises(DataError, match="2 blocks without a label"):
        LabelledBlocks(tokens(), labels)
    with pytest.raises(DataError, match=r"labels \(11, 10\): must be \(12, 10\)"):
        LabelledBlocks(tokens(), labels[1:])
