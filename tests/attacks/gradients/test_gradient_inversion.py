"""Averaged updates: tokens from embedding rows, labels from a bias, texts from gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from fedsplit.attacks import (
    BiasGradient,
    EmbeddingUpdate,
    GradientInversion,
    Inversion,
    Truth,
    Update,
    View,
    score_tokens,
)
from fedsplit.attacks.gradients.update_inversion import align_batch
from fedsplit.attacks.gradients.update_sets import (
    label_counts_from_bias_gradient,
    tokens_from_embedding_update,
)
from fedsplit.errors import AttackError

V, T = 80, 5
SIZES = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}
CONFIG = BertConfig(
    vocab_size=V,
    num_attention_heads=2,
    max_position_embeddings=16,
    num_labels=4,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.15,
    attn_implementation="eager",
    **SIZES,
)


def make_model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(CONFIG).eval()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_joint_bottom_names_its_tokens(optimizer: str):
    model = make_model()
    table = model.get_input_embeddings().weight
    before = table.detach().clone()
    ids = [torch.randint(1, V, (T,), generator=torch.Generator().manual_seed(i)) for i in (1, 2, 3)]
    step = (
        torch.optim.SGD(model.parameters(), lr=0.1)
        if optimizer == "sgd"
        else torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    )
    for x in ids:
        step.zero_grad()
        model(input_ids=x[None], labels=torch.tensor([1])).loss.backward()
        step.step()

    found = tokens_from_embedding_update(before, table)

    assert torch.equal(found, torch.unique(torch.cat(ids)))
    update = Update(before={"w": before}, after={"w": table.detach()})
    result = EmbeddingUpdate().run(View(update=update), Truth(ids=ids))
    assert (result.success, result.extra["precision"]) == (1.0, 1.0)
    assert len(tokens_from_embedding_update(before, before)) == 0


@pytest.mark.parametrize("batch", [1, 24])
def test_a_bias_counts_labels(batch: int):
    g = torch.Generator().manual_seed(batch)
    z = 0.1 * torch.randn(batch, 4, generator=g)
    y = torch.multinomial(torch.tensor([0.6, 0.2, 0.1, 0.1]), batch, True, generator=g)
    bias = torch.zeros(4, requires_grad=True)
    F.cross_entropy(z + bias, y).backward()

    update = Update(gradient={"head.bias": bias.grad}, shape=(batch, 1))
    result = BiasGradient().run(View(update=update), Truth(labels=y))
    assert int(label_counts_from_bias_gradient(bias.grad, batch).sum()) == batch
    assert result.success >= (1.0 if batch == 1 else 0.9)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_small_batch_is_read_from_its_gradient(batch: int):
    model = make_model()
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(5, V, (batch, T), generator=g)
    labels = torch.arange(batch)
    table = model.get_input_embeddings().weight
    parameters = [p for n, p in model.named_parameters() if "word_embeddings" not in n]
    truth = torch.autograd.grad(
        model(input_ids=ids, labels=labels).loss, [*parameters, table], allow_unused=True
    )
    pairs = [(p, t) for p, t in zip(parameters, truth[:-1], strict=True) if t is not None]
    moved = tokens_from_embedding_update(table, table - 0.1 * truth[-1])

    found = GradientInversion(steps=300, restarts=1).invert(
        [t for _, t in pairs],
        [p for p, _ in pairs],
        lambda soft: model(inputs_embeds=soft, labels=labels).loss,
        table,
        (batch, T),
        candidates=moved,
    )

    result = score_tokens("gradient", align_batch(found, list(ids)), list(ids))
    assert result.success >= 0.7  # guessing among the moved rows: 0.2 and 0.1


def test_a_batch_has_no_order():
    truth = [torch.tensor([1, 2]), torch.tensor([3, 4])]
    guess = [torch.tensor([3, 4]), torch.tensor([1, 9])]

    found = align_batch(Inversion([x[:, None] for x in guess], 0.0), truth)

    assert score_tokens("x", found, truth).success == 0.75


def test_misfits_are_refused():
    with pytest.raises(AttackError, match="after="):
        tokens_from_embedding_update(torch.zeros(3, 2), torch.zeros(2, 2))
    with pytest.raises(AttackError, match=r"must be \(C,\)"):
        label_counts_from_bias_gradient(torch.zeros(2, 2), 1)
    with pytest.raises(AttackError, match="must fit 1 parameters"):
        GradientInversion().invert(
            [], [torch.zeros(1)], lambda x: x.sum(), torch.zeros(3, 2), (1, 1)
        )
