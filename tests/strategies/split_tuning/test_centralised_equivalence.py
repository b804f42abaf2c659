"""Federated equals centralised: the same steps by one process with the plain Hugging Face model.

The reference shares nothing with the federation but the plan (which samples are in which step): its
model is ``AutoModel...from_pretrained``, its loss and its SGD step are written out here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from fedsplit.config import RunConfig
from fedsplit.errors import SessionError
from fedsplit.owners.data_source import simulated_shares
from fedsplit.owners.split.owner import SplitOwner
from fedsplit.owners.split.schedule import slot_order, train_steps
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.wire.frames import Frame, Kind

LR = 0.05
PLAIN_SGD: dict[str, Any] = {
    "train__optimizer": "sgd",
    "train__lr": LR,
    "train__head_lr": 0.0,
    "train__bottom_lr": LR,
    "train__weight_decay": 0.0,
    "train__clip": 0.0,
    "train__warmup": 0.0,
    "train__schedule": "constant",
    "train__batch_size": 7,
    # Owners of different sizes: their last batches, and their numbers of steps, differ.
    "data__partition": "dirichlet",
    "data__alpha": 2.0,
    "output__evaluate_every": 0,
    "lineage__gate": "off",
    # The law is that of the plain mean: owners so different in size would be bounded.
    "robust__clip": 0.0,
    "robust__weight_cap": 0.0,
    "robust__screen": False,
}
Skips = Callable[[int, int, int], bool]


def nobody(owner: int, round_: int, step: int) -> bool:
    return False


class Centralised:
    """One process that trains the whole model on the union of the owners' batches."""

    def __init__(self, config: RunConfig, *, joint: bool = False) -> None:
        self.config = config
        self.causal = config.model.task == "causal-lm"
        kind = AutoModelForCausalLM if self.causal else AutoModelForSequenceClassification
        self.model = kind.from_pretrained(config.model.name).eval()
        if self.causal and self.model.config.tie_word_embeddings:  # each half has its own matrix
            self.model.lm_head.weight = nn.Parameter(self.model.lm_head.weight.detach().clone())
        self.tokenizer = AutoTokenizer.from_pretrained(config.model.name)
        lowest = re.compile(r"embeddings\.|embed_tokens\.|.*layers?\.(\d+)\.")
        self.trained = []
        for name, parameter in self.model.named_parameters():
            found = lowest.match(name.partition(".")[2])
            below = bool(found) and (found[1] is None or int(found[1]) < config.split.k)
            if joint or not below:
                self.trained.append(parameter)
        self.shares = simulated_shares(config.data, config.seed, not self.causal)

    def plan(self, owner: int, round_: int) -> list[list[tuple[list[int], int]]]:
        """Batches of (token ids, label) in the owner's order."""
        name, train = f"owner-{owner}", self.shares[owner][0]
        secret = OwnerSecret.for_simulation(self.config.seed, name)
        order = slot_order(secret, "train", len(train))
        steps, _ = train_steps(len(train), self.config.train, self.config.seed, name, round_)
        length = self.config.model.max_tokens
        ids = self.tokenizer(list(train.texts), truncation=True, max_length=length)["input_ids"]
        labels = [0] * len(train) if self.causal else [int(x) for x in train.labels]
        return [[(ids[order[s]], labels[order[s]]) for s in batch] for batch in steps]

    def run(self, skip: Skips = nobody) -> int:
        """Train; leave out owner ``i`` at a step where ``skip(i, round, step)``."""
        taken = 0
        for round_ in range(1, self.config.train.rounds + 1):
            plans = [self.plan(owner, round_) for owner in range(len(self.shares))]
            for step in range(max(len(plan) for plan in plans)):
                union = [
                    sample
                    for owner, plan in enumerate(plans)
                    if step < len(plan) and not skip(owner, round_, step)
                    for sample in plan[step]
                ]
                self.step(union)
                taken += 1
        return taken

    def step(self, samples: list[tuple[list[int], int]]) -> None:
        width = max(len(ids) for ids, _ in samples)
        ids = torch.zeros(len(samples), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, (tokens, _) in enumerate(samples):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        if self.causal:
            real = mask[:, 1:].bool()
            loss = functional.cross_entropy(logits[:, :-1][real], ids[:, 1:][real])
        else:
            loss = functional.cross_entropy(logits, torch.tensor([label for _, label in samples]))
        gradients = torch.autograd.grad(loss, self.trained, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(self.trained, gradients, strict=True):
                if gradient is not None:
                    parameter -= LR * gradient


def whole_name(name: str, k: int) -> str:
    """Return the whole model's name for a parameter of the top."""
    return re.sub(
        r"(layers?)\.(\d+)\.",
        lambda m: f"{m[1]}.{int(m[2]) + k}.",
        name.removeprefix("model.") if not name.startswith("model.model.") else name[6:],
    )


def worst(federated: Iterable[tuple[str, Tensor]], reference: nn.Module) -> float:
    theirs = dict(reference.named_parameters(remove_duplicate=False))
    return max(float((value - theirs[name]).abs().max()) for name, value in federated)


def moved(model: nn.Module, path: str, causal: bool) -> float:
    kind = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    start = dict(kind.from_pretrained(path).named_parameters(remove_duplicate=False))
    now = model.named_parameters(remove_duplicate=False)
    return max(float((value - start[name]).abs().max()) for name, value in now)


def family(name: str, bert: Path, llama: Path) -> dict[str, Any]:
    if name == "bert":
        return {"model__name": str(bert)}
    return {"model__name": str(llama), "model__task": "causal-lm", "data__partition": "iid"}


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_frozen_bottom_equals_training_the_whole_with_its_bottom_frozen(
    make_config: Any, run_locally: Any, tiny_bert: Path, tiny_llama: Path, name: str, k: int
) -> None:
    options = PLAIN_SGD | family(name, tiny_bert, tiny_llama)
    config = make_config(split__k=k, train__max_steps=0, train__rounds=1, **options)
    run = run_locally(config)
    reference = Centralised(config)
    steps = reference.run()
    assert run.server["rounds"][0]["train"]["steps"] == steps >= 5
    top = [(whole_name(n, k), p) for n, p in run.state.items()]
    assert len(top) == len(reference.trained)
    assert worst(top, reference.model) < 2e-6
    assert moved(reference.model, config.model.name, name == "llama") > 1e-3


@pytest.mark.parametrize(("name", "k"), [("bert", 0), ("bert", 2), ("llama", 1)])
def test_joint_bottom_with_one_step_a_round_equals_training_the_whole(
    make_config: Any, run_locally: Any, tiny_bert: Path, tiny_llama: Path, name: str, k: int
) -> None:
    options = PLAIN_SGD | family(name, tiny_bert, tiny_llama)
    options |= {"split__bottom": "joint", "train__max_steps": 1, "train__rounds": 3}
    options |= {"train__batch_size": 31, "data__alpha": 1.0}  # more than the smallest owner has
    config = make_config(split__k=k, **options)
    reference = Centralised(config, joint=True)
    if name == "bert":
        sizes = {len(reference.plan(owner, 1)[0]) for owner in range(3)}
        assert len(sizes) > 1, "owners should bring batches of different sizes"
    run = run_locally(config)
    reference.run()
    top = [(whole_name(n, k), p) for n, p in run.state.items()]
    prefix = f"{reference.model.base_model_prefix}."
    averaged = {n: torch.tensor(a.numpy()) for n, a in run.result.arrays.items()}
    bottom = [(prefix + n.removeprefix("model."), p) for n, p in averaged.items()]
    assert worst(top, reference.model) < 2e-6
    assert worst(bottom, reference.model) < 2e-6
    assert moved(reference.model, config.model.name, name == "llama") > 1e-3


@pytest.mark.parametrize("transport", ["stream", "messages"])
@pytest.mark.parametrize("when", ["before its gradient", "before its batch"])
def test_an_owner_that_drops_leaves_a_correctly_normalised_update(
    make_config: Any,
    run_locally: Any,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
    transport: str,
) -> None:
    config = make_config(
        split__k=1, train__max_steps=4, train__rounds=1, session__transport=transport, **PLAIN_SGD
    )
    reference = Centralised(config)
    victim = len(reference.shares[1][0])
    assert [len(train) for train, _ in reference.shares].count(victim) == 1
    handle = SplitOwner.handle

    def failing(self: SplitOwner, frame: Frame) -> Any:
        def at(kind: Kind, found: Any) -> bool:
            mine = len(self.samples) == victim and found.kind is kind
            return mine and found.header["step"] == 2

        if when == "before its gradient" and at(Kind.LOGITS, frame):
            raise SessionError("power cut")
        for outgoing in handle(self, frame):
            if when == "before its batch" and at(Kind.BATCH, outgoing):
                raise SessionError("power cut")
            yield outgoing

    monkeypatch.setattr(SplitOwner, "handle", failing)
    run = run_locally(config)
    # Batches are sent ahead: an owner that fails while sending batch 2 has failed in step 0 or 1.
    lost = run.server["rounds"][0]["train"]["lost"]
    assert list(lost) == ["owner-1"]
    assert "power cut" in lost["owner-1"]
    assert run.server["rounds"][0]["train"]["finished"] == ["owner-0", "owner-2"]
    states = []
    for last in range(5):
        reference = Centralised(config)
        reference.run(lambda owner, _, step, last=last: owner == 1 and step >= last)
        top = [(whole_name(n, 1), p) for n, p in run.state.items()]
        states.append(worst(top, reference.model))
    if when == "before its gradient":
        assert states[2] < 2e-6
    assert min(states) < 2e-6
    assert sorted(states)[1] > 1e-4, "every other step of leaving gives another model"
