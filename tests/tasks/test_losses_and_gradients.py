"""Each task's loss is transformers' own, and a gradient that no label explains is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from fedsplit.errors import ConfigError
from fedsplit.models import load, split
from fedsplit.owners.samples import Samples, text_identity
from fedsplit.owners.split.label_side import LabelSide
from fedsplit.owners.split.output import OutputReader
from fedsplit.settings import read_settings
from fedsplit.tasks import TASKS, Task, task_of
from fedsplit.tasks.base import MAX_LOGIT
from fedsplit.wire.codecs import decode_rows, encode_rows
from strategies.split_tuning.gradient_bounds import GradientBounds
from tests.tiny_models import save_tiny_bert

SETTINGS: dict[str, dict[str, Any]] = {
    "sequence-classification": {"model.labels": 4},
    "regression": {"model.label-range": "0,5"},
    "multi-label": {"model.labels": 4},
}
TEXT_TASKS = [name for name, task in TASKS.items() if task.labelled and not task.per_token]
IDS = tuple(torch.tensor([2, *range(5 + i, 9 + 2 * i), 3]) for i in range(6))


def task(name: str, **more: Any) -> Task:
    return task_of(read_settings({"model.task": name, **SETTINGS[name], **more}))


def labels(name: str, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Any] = torch.randint(0, 4, (count,), generator=generator).tolist()
    if name == "regression":
        drawn = [1.25 * x for x in drawn]
    if name == "multi-label":
        drawn = [(0, 2), (), (3,), (0, 1, 2, 3), (1,), (2,)] * count
    return task(name).tensor(drawn[:count], [str(i) for i in range(count)])


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("name", TEXT_TASKS)
def test_both_halves_learn_what_the_whole_model_learns(bert: Path, name: str, k: int) -> None:
    """The reference: transformers' own class with its own loss for ``problem_type``."""
    own, targets = task(name), labels(name, len(IDS))
    loaded = load(str(bert), name, num_labels=own.outputs)
    ids = torch.nn.utils.rnn.pad_sequence(list(IDS), batch_first=True)
    mask = (ids != 0).long()
    whole = AutoModelForSequenceClassification.from_config(loaded.model.config)
    assert whole.config.problem_type == (own.problem or None)
    whole.load_state_dict(loaded.model.state_dict())
    reference = whole.eval()(input_ids=ids, attention_mask=mask, labels=targets)
    reference.loss.backward()

    bottom, top = split(loaded.model, k)
    hidden = bottom(ids, mask)
    logits = top.eval()(hidden, mask)
    samples = Samples(IDS, targets, tuple(text_identity(str(i)) for i in range(len(IDS))))
    side = LabelSide(OutputReader(samples, classify=True, classes=own.outputs or 0), task=own)
    answer = side.answer(logits.detach(), range(len(IDS)), train=True)
    torch.autograd.backward([logits], [answer.gradient])

    assert answer.loss == pytest.approx(float(reference.loss.detach()), abs=1e-5)
    assert torch.allclose(logits, reference.logits, atol=1e-5)
    theirs = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
    mine = {n: p.grad for n, p in loaded.model.named_parameters() if p.grad is not None}
    assert mine.keys() == theirs.keys()
    for key, gradient in theirs.items():
        assert torch.allclose(mine[key], gradient, atol=1e-5), key


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("scale", [0.1, 2.0, 9.0])
@pytest.mark.parametrize("name", TEXT_TASKS)
def test_an_honest_gradient_passes_as_it_is_and_another_does_not(
    name: str, scale: float, codec: str
) -> None:
    config = read_settings({"model.task": name, **SETTINGS[name], "session.logits-codec": codec})
    own, targets = task_of(config), labels(name, 24)
    generator = torch.Generator().manual_seed(1)
    sent = scale * torch.randn(24, own.outputs or 1, generator=generator)
    seen = own.bounded(decode_rows(encode_rows(sent, codec), sent.shape, codec)).requires_grad_()
    (gradient,) = torch.autograd.grad(own.loss(seen, targets), [seen])
    gradient = decode_rows(encode_rows(gradient, codec), gradient.shape, codec)
    assert own.row_bound is not None
    assert float(gradient.norm(dim=1).max()) * 24 <= own.row_bound * 1.02

    bounds = GradientBounds(config)
    found, charged = bounds([("a", (gradient, 24.0))], {"a": sent})
    assert not charged
    assert torch.equal(found[0][1][0], gradient)

    odd = gradient + 0.9 * own.row_bound / 24  # of no label that there is
    found, charged = bounds([("a", (odd, 24.0))], {"a": sent})
    assert "no label explains" in charged["a"]
    assert float(found[0][1][0].abs().amax(dim=1).min()) == 0.0


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_crafted_outputs_are_cut_before_a_loss_is_made_of_them(name: str) -> None:
    own, targets = task(name), labels(name, 6)
    wild = torch.full((6, own.outputs or 1), 1e30)
    wild[:, 0] = -1e30
    loss = float(own.loss(own.bounded(wild), targets))
    assert math.isfinite(loss)
    assert loss <= 2 * MAX_LOGIT
    tame = torch.linspace(-1, 1, 6 * (own.outputs or 1)).reshape(6, -1)
    assert own.bounded(tame) is tame


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_the_mean_of_the_parts_is_the_whole(name: str) -> None:
    own, targets = task(name), labels(name, 7)
    scores = torch.randn(7, own.outputs or 1, generator=torch.Generator().manual_seed(2))
    parts = own.losses(scores, targets)
    assert parts.shape == (7,)
    assert float(parts.mean()) == pytest.approx(float(own.loss(scores, targets)), rel=1e-6)


@pytest.mark.parametrize("name", ["sequence-classification", "regression"])
def test_a_hypothesis_that_readers_try_explains_its_own_label(name: str) -> None:
    own, targets = task(name), labels(name, 9)
    tried, truth = own.hypotheses(targets), own.truth(targets)
    assert tried is not None
    best = torch.stack(tried)[truth, torch.arange(9)]
    assert torch.allclose(best.double(), targets.double(), atol=0.0501)
    assert int(truth.max()) < len(tried)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model.task": "masked-lm"}, "model.task='masked-lm': must be one of causal-lm, mul"),
        ({"model.task": "regression"}, "model.label-range='': must be the least and the largest"),
        ({"model.task": "regression", "model.label-range": "5,0"}, "model.label-range='5,0'"),
        ({"model.task": "regression", "model.label-range": "0,nan"}, "model.label-range='0,nan'"),
        ({"model.task": "multi-label", "model.labels": 1}, "model.labels=1: must be in"),
        (
            {"model.task": "multi-label", "model.labels": 3, "model.label-names": "a,b"},
            "model.label-names='a,b': must be 3 names",
        ),
    ],
)
def test_settings_that_a_task_does_not_fit(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_settings(settings)


@pytest.mark.parametrize("name", ["regression", "multi-label"])
def test_what_is_done_class_by_class_is_refused_where_there_is_no_one_class(name: str) -> None:
    about = {"model.task": name, **SETTINGS[name]}
    for kept in ("none", "client-head", "row-noise", "client-head+row-noise"):
        read_settings({**about, "labels.protection": kept})
    read_settings({**about, "labels.protection": "client-tail", "train.method": "head"})
    for other in ("randomised-response", "marvell", "max-norm", "client-head+marvell"):
        with pytest.raises(ConfigError, match=rf"labels.protection=.*, not {name}"):
            read_settings({**about, "labels.protection": other})
    with pytest.raises(ConfigError, match=r"privacy\.cti='purity': must be off or"):
        read_settings({**about, "privacy.cti": "purity"})


def _weighted(weights: str, **changes: Any) -> Any:
    flat = {"model.labels": 3, "train.class-weights": weights, **changes}
    return read_settings(flat)


def test_weighted_losses_of_owners_add_up_to_that_of_all() -> None:
    task = task_of(_weighted("1,0.5,20"))
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(12, 3, generator=generator).requires_grad_()
    targets = torch.randint(0, 3, (12,), generator=generator)

    whole = task.loss(scores, targets)
    parts = [task.loss(scores[a:b], targets[a:b]) * (b - a) / 12 for a, b in ((0, 5), (5, 12))]

    weights = torch.tensor([1.0, 0.5, 20.0])
    expected = functional.cross_entropy(scores, targets, weights, reduction="sum") / 12
    assert float(whole) == pytest.approx(float(sum(parts)), rel=1e-6)
    assert float(whole) == pytest.approx(float(expected), rel=1e-6)
    (rows,) = torch.autograd.grad(whole, [scores])
    assert float(task.unexplained(rows * 12, scores.detach()).max()) < 1e-5
    assert float((rows * 12).norm(dim=1).max()) <= task.row_bound
    plain = task_of(_weighted(""))
    assert float(plain.unexplained(rows * 12, scores.detach()).max()) > plain.tolerance


@pytest.mark.parametrize(
    ("weights", "changes"),
    [
        ("1,2", {}),
        ("1,2,x", {}),
        ("1,2,nan", {}),
        ("0,1,1", {}),
        ("1,1,101", {}),
        ("1,1,1", {"model.task": "causal-lm"}),
        ("1,1,1", {"model.task": "regression", "model.label-range": "0,1"}),
        ("1,1,1", {"labels.protection": "randomised-response", "labels.debias": True}),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"train\.class-weights"):
        _weighted(weights, **changes)
