"""The kind ``instruct``: prompts and answers learned in several ways, judged on the same held-out ones.

| way | what answers |
| --- | --- |
| ``zero-shot`` | the base model |
| ``centralised`` | the base tuned in one place, with the steps of ``split`` |
| ``split`` | what split tuning leaves, nothing protected |
| ``split-protected`` | the same with the settings of the option ``protection`` |
| ``offsite`` | the base with adapters tuned inside an emulator plugged in |

Each way is a cell: a federated run in this process with all owners, then every metric on the owners'
held-out conversations, which the experimenter knows and no server does.  Where the data are questions
with choices, ``choice_accuracy`` and ``choice_accuracy_norm`` are among them: the share of questions
whose right choice is the likeliest answer, by its summed log-likelihood and by its mean over characters.
"""  # noqa: E501

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.config.offsite import INSTEAD
from fedsplit.data import choices, load_splits
from fedsplit.data.conversations import ASSISTANT, Message, from_text, to_text
from fedsplit.errors import ConfigError, DataError, check
from fedsplit.models.chat_template import encode_prompt
from fedsplit.models.loading import load
from fedsplit.models.trained.whole import whole_of_run
from fedsplit.owners.data_source import reading, simulated_shares
from fedsplit.owners.samples import tokenise_chat
from fedsplit.registry import pick
from fedsplit.settings import read_settings
from simulations.core.cells import CellStore, Row, product, run_cells
from simulations.core.owner_samples import owner_samples
from simulations.core.run_folder import RunFolder
from simulations.core.setting import ExperimentSetting
from simulations.core.settings import Experiment, read_options
from simulations.core.tables import make_table
from simulations.runtime.local_run import run_in_process
from simulations.split.centralised import CentralisedTwin

Logits = Callable[[Tensor], Tensor]  # ids (1, T) -> logits (1, T, V)
OPTIONS: dict[str, Any] = {
    "ways": ["zero-shot", "centralised", "split", "split-protected", "offsite"],
    # No gradient returns to the server, which then trains nothing: owners do, and are averaged.
    "protection": {"labels.protection": "client-tail", "train.method": "head"},
    "prompts": 32,  # held-out ones that are answered, of all owners together
    "new-tokens": 16,
    "questions": 200,  # held-out ones whose choices are compared, of all owners together
}


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the experiment; finished ways are kept if it is killed."""
    options = read_options(experiment.options, OPTIONS)
    for way in options["ways"]:
        pick(WAYS, way, "way")
    check(options["prompts"] >= 1, "options.prompts", options["prompts"], ">= 1")
    check(options["new-tokens"] >= 1, "options.new-tokens", options["new-tokens"], ">= 1")
    check(options["questions"] >= 1, "options.questions", options["questions"], ">= 1")
    store = CellStore.open(folder, experiment.config, options, ("ways",))
    setting = InstructSetting(experiment.config, options, folder.path, store)
    keys = product(way=options["ways"])
    rows = run_cells(experiment, folder, console, store, keys, setting.cell)
    shown = ([r["data"], r["way"], r["metric"], f"{r['value']:.4f}"] for r in rows)
    title = f"{experiment.config.model.name}, {experiment.config.data.owners} owners"
    console.print(make_table(("data", "way", "metric", "value"), shown, title=title, left=3))


@dataclass
class InstructSetting(ExperimentSetting):
    """The owners' held-out conversations, and each way's model."""

    @cached_property
    def held_out(self) -> list[list[Message]]:
        """All owners' held-out conversations."""
        shares = simulated_shares(self.config.data, self.config.seed, False)
        if not shares[0][0].chat:
            raise ConfigError(f"data.kind={self.config.data.kind!r}: must have prompts and answers")
        return [from_text(text) for _, test in shares for text in test.texts]

    def cell(self, way: str) -> list[Row]:
        """Return the rows of one way: a metric each."""
        logits = WAYS[way](self, (self.folder or Path(".")) / way)
        found = {"answer_loss": self._loss(logits), "exact_match": self._exact(logits)}
        if all(map(self._choices, self.held_out)):
            found |= self._chosen(logits)
        return [{"data": self.data, "way": way, "metric": m, "value": v} for m, v in found.items()]

    @cached_property
    def _questions(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """Choices, the right one first, by question and right choice; none in other data."""
        _, asked = reading(self.config.data, labelled=False)
        try:
            train, test = load_splits("choices", **asked)
        except DataError:
            return {}
        read = [train] if test is None else [train, test]
        parts = [choices.from_text(text) for data in read for text in data.texts]
        return {(question, found[0]): found for question, found in parts}

    def _choices(self, conversation: list[Message]) -> tuple[str, ...]:
        """Return what a conversation's answer was chosen from, itself first; () if it was not."""
        if len(conversation) != 2:
            return ()
        return self._questions.get((conversation[0][1], conversation[1][1]), ())

    @torch.no_grad()
    def _chosen(self, logits: Logits) -> dict[str, float]:
        """Return the shares of questions whose right choice is the likeliest; a tie is wrong."""
        right, right_norm = 0, 0
        asked = self.held_out[: self.options["questions"]]
        for conversation in asked:
            offered = self._choices(conversation)
            texts = [to_text([*conversation[:-1], (ASSISTANT, choice)]) for choice in offered]
            sums = [self._likelihood(logits, text) for text in texts]
            means = [total / len(choice) for total, choice in zip(sums, offered, strict=True)]
            right += sums[0] > max(sums[1:])
            right_norm += means[0] > max(means[1:])
        return {
            "choice_accuracy": right / len(asked),
            "choice_accuracy_norm": right_norm / len(asked),
        }

    def _likelihood(self, logits: Logits, text: str) -> float:
        """Return the log-likelihood of a conversation's answer, nats."""
        samples = tokenise_chat(
            self.loaded.tokenizer, [text], max_tokens=self.config.model.max_tokens
        )
        ids, at = samples.ids[0], samples.predicting(0)
        scores = logits(ids[None])[0, at].float().log_softmax(-1)
        return float(scores.gather(1, ids[at + 1][:, None]).sum())

    def changed(self, **settings: Any) -> RunConfig:
        """Return the run's settings with some changed."""
        flat = {k.replace("__", "."): v for k, v in settings.items()}
        return read_settings({**self.config.to_flat(), **flat})

    @torch.no_grad()
    def _loss(self, logits: Logits) -> float:
        """Return the mean loss of the answers' tokens, in nats."""
        shares = simulated_shares(self.config.data, self.config.seed, False)
        total, count = 0.0, 0
        for _, test in shares:
            samples = tokenise_chat(
                self.loaded.tokenizer, test.texts, max_tokens=self.config.model.max_tokens
            )
            for slot, ids in enumerate(samples.ids):
                at = samples.predicting(slot)
                scores = logits(ids[None])[0, at].float().log_softmax(-1)
                total -= float(scores.gather(1, ids[at + 1][:, None]).sum())
                count += len(at)
        return total / count

    @torch.no_grad()
    def _exact(self, logits: Logits) -> float:
        """Return the share of prompts whose most probable answer is the owner's, word for word."""
        tokenizer, right = self.loaded.tokenizer, 0
        chosen = self.held_out[: self.options["prompts"]]
        for conversation in chosen:
            ids = torch.tensor([encode_prompt(tokenizer, conversation[:-1])])
            begin = ids.shape[1]
            for _ in range(self.options["new-tokens"]):
                token = int(logits(ids)[0, -1].argmax())
                if token == tokenizer.eos_token_id:
                    break
                ids = torch.cat([ids, torch.tensor([[token]])], 1)
            answer = str(tokenizer.decode(ids[0, begin:], skip_special_tokens=True))
            right += plain_words(answer) == plain_words(conversation[-1][1])
        return right / len(chosen)


def plain_words(text: str) -> list[str]:
    """Return a text's words in lower case, without punctuation and articles (as SQuAD does)."""
    kept = "".join(" " if c in string.punctuation else c for c in text.lower())
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def _zero_shot(setting: InstructSetting, folder: Path) -> Logits:
    return _of_model(setting.loaded.model)


def _centralised(setting: InstructSetting, folder: Path) -> Logits:
    config = setting.changed(strategy="split-tuning")
    owners = owner_samples(config, setting.loaded.tokenizer)
    twin = CentralisedTwin(config, owners)
    twin.run([[[owner.name for owner in owners]]] * config.train.rounds)
    return lambda ids: twin.top(twin.bottom(ids))


def _split(setting: InstructSetting, folder: Path, **protection: Any) -> Logits:
    run_in_process(setting.changed(strategy="split-tuning", **protection), folder)
    return _of_model(whole_of_run(folder / "server").loaded.model)


def _protected(setting: InstructSetting, folder: Path) -> Logits:
    return _split(setting, folder, **setting.options["protection"])


def _offsite(setting: InstructSetting, folder: Path) -> Logits:
    usual = RunConfig().to_flat()
    unread = {name: usual[name] for name in INSTEAD}  # what the split ways alone read
    config = setting.changed(strategy="offsite-tuning", **unread)
    run_in_process(replace(config, output=replace(config.output, save=True)), folder)
    return _of_model(load(folder / "server" / "model", "causal-lm").model)


def _of_model(model: Any) -> Logits:
    model.eval()

    def logits(ids: Tensor) -> Tensor:
        found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return found

    return logits


WAYS: dict[str, Callable[[InstructSetting, Path], Logits]] = {
    "zero-shot": _zero_shot,
    "centralised": _centralised,
    "split": _split,
    "split-protected": _protected,
    "offsite": _offsite,
}
