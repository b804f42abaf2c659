"""Prompts with completions: split and offsite steps equal an independent reference."""

from __future__ import annotations

import json
import logging
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedsplit.emulators.files import load_emulator
from fedsplit.models.loading import local_tokenizer
from fedsplit.owners.data_source import simulated_shares
from fedsplit.owners.offsite.owner import AdapterOwner, blocks_of_sets
from fedsplit.owners.samples import tokenise_chat
from fedsplit.owners.split.schedule import slot_order, train_steps
from fedsplit.privacy.secret import OwnerSecret
from simulations.core.owner_samples import owner_samples
from simulations.runtime.local_run import run_in_process
from simulations.split.centralised import CentralisedTwin
from tests.strategies.split_tuning.test_centralised_equivalence import (
    PLAIN_SGD,
    Centralised,
    moved,
    whole_name,
    worst,
)

pytest.importorskip("jinja2")

TEMPLATE = (
    "{% for m in messages %}{{ 'w80 ' if m['role'] == 'user' else 'w81 ' }}{{ m['content'] }}"
    "{{ ' [SEP] ' }}{% endfor %}{% if add_generation_prompt %}{{ 'w81 ' }}{% endif %}"
)
END = 3
USER, ASSISTANT = 80 + 4, 81 + 4  # ids of w80, w81


@pytest.fixture(scope="module")
def asked(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_llama, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    path = folder.parent / "asked.jsonl"
    draw = random.Random(4)

    def words(most: int) -> str:
        return " ".join(f"w{draw.randrange(70)}" for _ in range(draw.randint(1, most)))

    rows = [{"prompt": words(6), "completion": words(4)} for _ in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model__name": str(folder),
        "model__task": "causal-lm",
        "data__kind": "instructions",
        "data__path": str(path),
        "data__partition": "iid",
    }


def by_hand(text: str) -> tuple[list[int], int]:
    """Return a conversation's ids, and where its completion begins."""
    (_, prompt), (_, completion) = json.loads(text)
    one, two = ([int(w[1:]) + 4 for w in part.split()] for part in (prompt, completion))
    ids = [USER, *one, END, ASSISTANT]
    return [*ids, *two, END], len(ids)


def by_hugging_face(model: Any, samples: list[tuple[list[int], int]]) -> torch.Tensor:
    width = max(len(ids) for ids, _ in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (tokens, first) in enumerate(samples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, first : len(tokens)] = torch.tensor(tokens[first:])
    loss: torch.Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    return loss


class Instructed(Centralised):
    """The reference: the whole model, Hugging Face's own masked loss, SGD written out."""

    losses: list[float]

    def plan(self, owner: int, round_: int) -> list[list[tuple[list[int], int]]]:
        name, train = f"owner-{owner}", self.shares[owner][0]
        order = slot_order(OwnerSecret.for_simulation(self.config.seed, name), "train", len(train))
        steps, _ = train_steps(len(train), self.config.train, self.config.seed, name, round_)
        return [[by_hand(train.texts[order[s]]) for s in batch] for batch in steps]

    def step(self, samples: list[tuple[list[int], int]]) -> None:
        loss = by_hugging_face(self.model, samples)
        gradients = torch.autograd.grad(loss, self.trained, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(self.trained, gradients, strict=True):
                if gradient is not None:
                    parameter -= self.config.train.lr * gradient


def test_split_steps_are_the_references(
    make_config: Any, run_locally: Any, asked: dict[str, Any]
) -> None:
    config = make_config(split__k=1, train__max_steps=0, train__rounds=1, **PLAIN_SGD | asked)
    run = run_locally(config)
    reference = Instructed(config)
    assert reference.run() >= 2
    top = [(whole_name(n, 1), p) for n, p in run.state.items()]
    assert worst(top, reference.model) < 2e-6
    assert moved(reference.model, config.model.name, True) > 1e-3


def test_the_centralised_twin_masks_as_owners_do(make_config: Any, asked: dict[str, Any]) -> None:
    config = make_config(split__k=1, **asked)
    owners = owner_samples(config, local_tokenizer(config.model.name))
    twin = CentralisedTwin(config, owners)
    one, other = owners[0].train, owners[1].train
    logits, targets = twin.logits([(one, [0, 3]), (other, [1])])
    loss = torch.nn.functional.cross_entropy(logits, targets)
    texts = {s: [int(i) for i in o.train.ids[s]] for o in owners[:1] for s in (0, 3)}
    texts[-1] = [int(i) for i in other.ids[1]]
    samples = [(ids, 1 + ids.index(ASSISTANT)) for ids in texts.values()]
    model = AutoModelForCausalLM.from_pretrained(config.model.name).eval()
    assert float(loss) == pytest.approx(float(by_hugging_face(model, samples)), abs=1e-5)


def test_a_run_of_offsite_tuning_on_conversations(
    offsite: Any, asked: dict[str, Any], tmp_path: Path
) -> None:
    config = offsite(train__rounds=1, offsite__block=16, **asked)
    _, server = run_in_process(config, tmp_path / "run")
    assert server["rounds"][0]["train"]["finished"] == ["owner-0", "owner-1"]
    emulator = load_emulator(tmp_path / "run" / "server" / "emulator")
    shares = simulated_shares(config.data, config.seed, False)
    blocks = blocks_of_sets(local_tokenizer(config.model.name), *shares[0], 16)
    name = "owner-0"
    batches, _ = train_steps(len(blocks.train), config.train, config.seed, name, 1)
    samples = [by_hand(shares[0][0].texts[i]) for i in batches[0]]

    def gradients() -> list[torch.Tensor]:
        found = by_hugging_face(emulator.model, samples)
        return list(torch.autograd.grad(found, list(emulator.adapter_parameters().values())))

    expected = float(by_hugging_face(emulator.model.eval(), samples).detach())
    start = {n: p.detach().clone() for n, p in emulator.adapter_parameters().items()}
    wanted = gradients()
    for micro in (0, 1):
        again = load_emulator(tmp_path / "run" / "server" / "emulator")
        settings = replace(config, offsite=replace(config.offsite, micro_batch=micro))
        owner = AdapterOwner(again, blocks, settings, name)
        metrics = owner.train(1)
        assert metrics["loss"] == pytest.approx(expected, abs=1e-5)
        assert metrics["targets"] == sum(len(ids) - first for ids, first in samples)
        moved_by = {n: (start[n] - p) / 0.1 for n, p in owner.weights().items()}
        for name_, gradient in zip(start, wanted, strict=True):
            assert float((moved_by[name_] - gradient).abs().max()) < 1e-5, name_


def test_cuts_are_told_to_the_owner(
    asked: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = local_tokenizer(asked["model__name"])
    texts = ['[["user","w1 w2 w3 w4 w5 w6"],["assistant","w7"]]']
    with caplog.at_level(logging.WARNING):
        (ids,) = tokenise_chat(tokenizer, texts, max_tokens=6).ids
    assert ids.tolist()[-3:] == [ASSISTANT, 11, END]
    assert "1 lost tokens of their prompts" in caplog.text
    assert "completions" not in caplog.text  # nothing of them was lost: nothing is said
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        tokenise_chat(tokenizer, ['[["user","w1"],["assistant","w7 w8 w9 w7"]]'], max_tokens=4)
    assert "1 lost " in caplog.text
    assert "tokens of their completions to max_tokens=4" in caplog.text
