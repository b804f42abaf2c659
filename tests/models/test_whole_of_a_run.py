"""One model from what a split run trained: the logits of bottom then top, in all families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsplit.config import TrainConfig
from fedsplit.errors import ModelError, UnsupportedModelError
from fedsplit.models.adapters.files import attach_saved
from fedsplit.models.adapters.trainable import (
    make_trainable,
    method_options,
    trained_without_head,
)
from fedsplit.models.loading import LoadedModel
from fedsplit.models.splitting.equivalence import relative_difference
from fedsplit.models.splitting.halves import split
from fedsplit.models.splitting.heads import detach_head
from fedsplit.models.trained.weights import Trained
from fedsplit.models.trained.whole import WholeModel, assemble
from tests.models.split_families import CASES, FAMILIES, batch, tiny

K = 1
APART = ("mpnet", "deberta", "deberta-v2")  # one table of positions for all blocks
SOME = [("bert", "sequence-classification"), ("gpt2", "causal-lm"), ("llama", "causal-lm")]
SOME += [("gpt2", "sequence-classification")]


class NoTokenizer:
    def save_pretrained(self, folder: str | Path) -> None:
        (Path(folder) / "saved").touch()


def loaded(name: str, task: str) -> LoadedModel:
    return LoadedModel(tiny(name, task), NoTokenizer(), "d", "base")  # type: ignore[arg-type]


def trained(
    name: str, task: str, method: str, *, joint: bool = False, tail: int | None = None
) -> tuple[Trained, Tensor]:
    """Return what a run could have left, and the logits that its halves gave."""
    bottom, top = split(tiny(name, task), K, verify=False)
    head = None if tail is None else detach_head(top, blocks=tail)
    trainable = make_trainable(top, train_of(method).method, **method_options(train_of(method)))
    if head is not None:
        trainable = trained_without_head(trainable)
    generator = torch.Generator().manual_seed(7)
    owners: dict[str, torch.nn.Parameter] = dict(bottom.named_parameters()) if joint else {}
    if head is not None:
        owners |= {f"head.{n}": p for n, p in head.named_parameters()}
    owners = {n: p for n, p in owners.items() if p.is_floating_point()}
    with torch.no_grad():
        for p in [*trainable.parameters(), *owners.values()]:
            p += 0.1 * torch.randn(p.shape, generator=generator).to(p.dtype)
        ids, mask = batch()
        for half in (bottom, top, *([head] if head else [])):
            half.eval()
        hidden = bottom(ids, mask)
        logits = top(hidden, mask)
        if head is not None:
            logits = head(top.hidden_states(hidden, mask, tail=tail or 0), mask)
    left = Trained(trainable.state(), {n: p.detach().clone() for n, p in owners.items()})
    return left, kept(logits, mask)


def train_of(method: str) -> TrainConfig:
    if method in ("rslora", "dora"):
        return TrainConfig(method="lora", lora_form=method, lora_alpha=3.0, lora_rank=2)
    return TrainConfig(method=method)


def kept(logits: Tensor, mask: Tensor) -> Tensor:
    return logits[mask.bool()] if logits.ndim == 3 else logits


@torch.no_grad()
def says(model: Any) -> Tensor:
    ids, mask = batch()
    return kept(model.eval()(input_ids=ids, attention_mask=mask).logits, mask)


def assembled(name: str, task: str, method: str, **options: Any) -> tuple[WholeModel, Tensor]:
    left, expected = trained(name, task, method, **options)
    whole = assemble(loaded(name, task), left, K, train_of(method), tail=options.get("tail"))
    assert relative_difference(expected, says(whole.loaded.model)) < 1e-5
    assert relative_difference(expected, says(tiny(name, task))) > 1e-4
    return whole, expected


def reloaded(name: str, task: str, folder: Path) -> Any:
    auto = FAMILIES[name].tasks[task]
    options = {"dtype": FAMILIES[name].dtype, "experts_implementation": "eager"}
    return auto.from_pretrained(folder, use_safetensors=True, **options)


@pytest.mark.parametrize(("name", "task"), CASES)
def test_a_joint_run_of_any_family(name: str, task: str, tmp_path: Path) -> None:
    """Every tensor is trained, and a head that was tied to the embedding apart from it."""
    if name in APART:
        with pytest.raises(UnsupportedModelError, match="both halves hold it and trained it apart"):
            assembled(name, task, "all", joint=True)
        return
    whole, expected = assembled(name, task, "all", joint=True)
    about = whole.write(tmp_path)
    assert relative_difference(expected, says(reloaded(name, task, tmp_path / "model"))) < 1e-5
    assert about["adapter"] is None
    assert about["holders"]["bottom"] == "the owners together (averaged)"


@pytest.mark.parametrize(("name", "task"), CASES)
def test_lora_in_any_family(name: str, task: str) -> None:
    assembled(name, task, "lora")


@pytest.mark.parametrize(("name", "task"), SOME)
@pytest.mark.parametrize("method", ["head", "bitfit", "ia3", "lora", "rslora", "dora", "adapter"])
def test_methods_as_files(name: str, task: str, method: str, tmp_path: Path) -> None:
    if (name, method) == ("llama", "bitfit"):
        pytest.skip("LLaMA has no biases")
    whole, expected = assembled(name, task, method)
    about = whole.write(tmp_path)
    model = reloaded(name, task, tmp_path / "model")
    if method == "adapter":
        assert about["adapter"]["format"] == "fedsplit"
        attach_saved(model, tmp_path / "adapter")
    assert relative_difference(expected, says(model)) < 1e-5
    if method in ("ia3", "lora", "rslora", "dora"):
        from peft import PeftModel

        base = tiny(name, task)
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
        assert relative_difference(expected, says(adapted)) < 1e-5
        assert about["adapter"] == {"format": "peft", "on": "base"}


@pytest.mark.parametrize(("name", "task"), SOME)
@pytest.mark.parametrize(("method", "tail"), [("all", 0), ("lora", 0), ("all", 1), ("lora", 1)])
def test_a_head_or_tail_at_the_owners(
    name: str, task: str, method: str, tail: int, tmp_path: Path
) -> None:
    whole, expected = assembled(name, task, method, tail=tail)
    assert whole.holders()["head"] == "the owners together (averaged)"
    whole.write(tmp_path)
    assert relative_difference(expected, says(reloaded(name, task, tmp_path / "model"))) < 1e-5


def test_what_does_not_fit_is_refused() -> None:
    left, _ = trained("llama", "causal-lm", "lora")
    for method in ("all", "ia3"):
        other = loaded("llama", "causal-lm")
        with pytest.raises(ModelError, match="must be the"):
            assemble(other, left, K, TrainConfig(method=method))
    wrong = Trained(left.top, {"model.nothing": torch.ones(1)})
    with pytest.raises(ModelError, match="no parameter of that name"):
        assemble(loaded("llama", "causal-lm"), wrong, K, TrainConfig(method="lora"))
    other = loaded("llama", "causal-lm")
    with pytest.raises(ModelError, match="must be the"):
        assemble(other, left, K + 1, TrainConfig(method="lora"))
