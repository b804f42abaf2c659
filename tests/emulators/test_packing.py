"""Samples packed into blocks: losses and gradients of separate ones, no attention across."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.emulators.build import build_emulator
from fedsplit.emulators.lm import IGNORED, lm_loss, logits_of, mean_loss, target_counts
from fedsplit.emulators.packing import Sample, check_packing, pack_samples, pieces_of
from fedsplit.emulators.planning.plan import EmulatorPlan
from fedsplit.errors import ConfigError, DataError, UnsupportedModelError
from fedsplit.owners.offsite.owner import AdapterOwner, Blocks
from fedsplit.settings import read_settings
from tests.models.split_families import VOCAB, tiny

LENGTH = 12
PACKABLE = ("llama", "gpt2", "mistral", "qwen2", "qwen3", "gemma3_text", "mixtral")
REFUSED = ("bloom", "mpt", "opt")  # distances to a fixed origin, or a mask of their own


def samples(seed: int = 0) -> list[Sample]:
    """Prompts, and completions that alone are targets."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in (5, 3, 7, 2, 9, 4):
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 2] = IGNORED
        found.append((ids, labels))
    return found


def separate(model: Any, own: list[Sample]) -> tuple[Tensor, int]:
    """The independent reference: each sample by itself, nothing padded."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, labels in own:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        wanted = labels[1:] != IGNORED
        chosen = logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
        total = total - chosen[wanted].sum()
        count += int(wanted.sum())
    return total, count


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [g for g in found if g is not None]


@pytest.mark.parametrize("name", PACKABLE)
def test_packed_losses_and_gradients_are_those_of_separate_samples(name: str) -> None:
    model = tiny(name, "causal-lm")
    check_packing(model)
    own = samples()
    packed = pack_samples(own, LENGTH, 0)
    assert len(packed.ids) == 3, "30 tokens in blocks of 12"

    total, count = separate(model, own)
    logits = logits_of(model, packed.ids, packed.positions)
    mine = lm_loss(logits, packed.labels, "sum")

    assert int(target_counts(packed.labels).sum()) == count
    assert float(mine.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    expected, got = gradients(model, total / count), gradients(model, mine / count)
    assert len(expected) == len(got)
    scale = max(float(g.abs().max()) for g in expected)
    for one, other in zip(expected, got, strict=True):
        assert float((one - other).abs().max()) < 1e-5 * scale
    mean = mean_loss(model, packed.ids, 2, labels=packed.labels, positions=packed.positions)
    assert mean == pytest.approx(float(total.detach()) / count, rel=1e-5)


def test_another_sample_in_the_block_changes_nothing() -> None:
    model = tiny("llama", "causal-lm")
    first, second, third = samples()[0], samples()[1], samples(9)[1]
    with torch.no_grad():
        beside = [
            logits_of(model, p.ids, p.positions)[0, :5]
            for p in (pack_samples([first, other], LENGTH, 0) for other in (second, third))
        ]
        after = [
            logits_of(model, p.ids, p.positions)[0, 3:8]
            for p in (pack_samples([other, first], LENGTH, 0) for other in (second, third))
        ]
    assert torch.equal(*beside)
    assert torch.allclose(*after, rtol=1e-9)
    assert torch.allclose(beside[0], after[0], rtol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_cannot_pack_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="packed samples"):
        check_packing(tiny(name, "causal-lm"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=40), st.integers(16, 40))
def test_every_sample_is_whole_in_one_block_and_only_once(lengths: list[int], length: int) -> None:
    begin = [sum(lengths[:i]) for i in range(len(lengths))]
    own = [(torch.arange(b + 1, b + n + 1),) * 2 for b, n in zip(begin, lengths, strict=True)]
    packed = pack_samples(own, length, 0)  # type: ignore[arg-type]

    assert sorted(packed.ids[packed.ids > 0].tolist()) == list(range(1, sum(lengths) + 1))
    assert int(target_counts(packed.labels).sum()) == sum(n - 1 for n in lengths)
    for row, ids in enumerate(packed.ids):
        at = 0
        while at < length and ids[at] > 0:
            n = lengths[begin.index(int(ids[at]) - 1)]
            assert torch.equal(packed.positions[row, at : at + n], torch.arange(n))
            assert ids[at : at + n].tolist() == list(range(int(ids[at]), int(ids[at]) + n))
            assert packed.labels[row, at] == IGNORED
            at += n
        assert (packed.labels[row, at:] == IGNORED).all()
    used = [int((ids > 0).sum()) for ids in packed.ids]
    assert sum(2 * n <= length for n in used) <= 1, "two such blocks would have been one"


def test_a_long_text_is_cut_into_pieces() -> None:
    ids = torch.arange(11)
    assert [len(piece) for piece, _ in pieces_of(ids, 5)] == [5, 5]  # the last token predicts none
    assert torch.equal(torch.cat([piece for piece, _ in pieces_of(ids[:10], 4)]), ids[:10])


def owner(blocks: Blocks) -> AdapterOwner:
    config = RunConfig.from_flat(
        {
            "strategy": "offsite-tuning",
            "model.task": "causal-lm",
            "train.batch-size": 16,
            "train.optimizer": "sgd",
            "train.lr": 0.5,
            "train.clip": 0.0,
            "train.weight-decay": 0.0,
            "train.warmup": 0.0,
            "train.schedule": "constant",
            "offsite.micro-batch": 2,
        }
    )
    emulator = build_emulator(tiny("llama", "causal-lm"), EmulatorPlan(("adapter", "keep", "drop")))
    return AdapterOwner(emulator, blocks, config, "ann")


def test_an_owners_step_is_the_same_packed_and_not() -> None:
    packed = pack_samples(samples(), LENGTH, 0)
    rows = [pack_samples([one], LENGTH, 0) for one in samples()]
    ids, labels = torch.cat([r.ids for r in rows]), torch.cat([r.labels for r in rows])
    apart = owner(Blocks(ids, ids, labels, labels))
    together = owner(
        Blocks(
            packed.ids,
            packed.ids,
            packed.labels,
            packed.labels,
            packed.positions,
            packed.positions,
        )
    )
    before = {name: tensor.clone() for name, tensor in apart.weights().items()}

    one, other = apart.train(1), together.train(1)

    assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert other["targets"] == one["targets"]
    mine, theirs = apart.weights(), together.weights()
    moved = max(float((mine[n] - before[n]).abs().max()) for n in mine)
    assert moved > 1e-3
    assert all(float((mine[n] - theirs[n]).abs().max()) < 1e-5 * moved + 1e-7 for n in mine)
    assert together.evaluate()["loss"] == pytest.approx(apart.evaluate()["loss"], rel=1e-5)


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(DataError, match="0 samples"):
        pack_samples([], 8, 0)
    with pytest.raises(DataError, match="a sample of 9 tokens: must be <= 8"):
        pack_samples([samples()[4]], 8, 0)
    flat = {"strategy": "offsite-tuning", "model.task": "causal-lm", "offsite.packing": True}
    assert read_settings(flat).offsite.packing
    with pytest.raises(ConfigError, match=r"offsite\.packing=True: must be false with dp"):
        read_settings({**flat, "dp.noise-multiplier": 1.0})
