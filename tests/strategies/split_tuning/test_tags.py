"""Classification of words in whole runs: equal to one process, to Hugging Face, and to no leak."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForTokenClassification
from typer.testing import CliRunner

from fedsplit.attacks.labels.leakage import labels_from_logit_gradients
from fedsplit.cli import app_cli
from fedsplit.entities import count, scores
from fedsplit.errors import ConfigError, DataError, FedsplitError
from fedsplit.models import split
from fedsplit.models.adapters.trainable import make_trainable
from fedsplit.models.loading import local_tokenizer
from fedsplit.models.trained.weights import identity, load_trained
from fedsplit.models.trained.whole import whole_name
from fedsplit.owners.samples import Samples
from fedsplit.owners.serving.inference import tag
from fedsplit.owners.split.label_side import LabelSide
from fedsplit.owners.split.output import OutputReader
from fedsplit.privacy.labels.table import GradientShield, build_protection
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.tasks import TaggedWords, task_of
from simulations.core.owner_samples import owner_samples
from simulations.split.centralised import CentralisedTwin
from simulations.split.transcript_attacks import attack_transcript
from strategies.base_model import load_base
from tests.strategies.serving.test_serving import served

NAMES = ("O", "B-a", "I-a", "B-b", "I-b")
SGD = {
    "train__optimizer": "sgd",
    "train__lr": 0.1,
    "train__head_lr": 0.1,
    "train__weight_decay": 0.0,
    "train__warmup": 0.0,
    "train__schedule": "constant",
    "train__clip": 0.0,
}


def _texts() -> list[tuple[list[str], list[str]]]:
    """Return texts whose entities show in their words, some longer than the model reads."""
    draw = random.Random(3)
    found = []
    for _ in range(60):
        words, tags = [], []
        while len(words) < draw.randint(3, 20):
            kind = draw.choice(["", "", "a", "b"])
            if not kind:
                words.append(f"w{draw.randrange(60)}")
                tags.append("O")
                continue
            length = draw.randint(1, 3)
            first = 60 if kind == "a" else 75
            words += [f"w{first + draw.randrange(15)}" for _ in range(length)]
            tags += [f"B-{kind}", *[f"I-{kind}"] * (length - 1)]
        found.append((words, tags))
    return found


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tagged") / "texts.conll"
    texts = ("".join(f"{w}\t{t}\n" for w, t in zip(*one, strict=True)) for one in _texts())
    path.write_text("\n".join(texts))
    return path


@pytest.fixture
def tags(make_config: Any, tagged: Path) -> Any:
    def make(**overrides: Any) -> Any:
        return make_config(
            **{
                "model__task": "token-classification",
                "model__labels": len(NAMES),
                "model__label_names": ",".join(NAMES),
                "data__kind": "tagged",
                "data__path": str(tagged),
                **overrides,
            }
        )

    return make


def _twin(config: Any, run: Any) -> tuple[CentralisedTwin, Any]:
    twin = CentralisedTwin(config, owner_samples(config, load_base(config).tokenizer))
    return twin, twin.run([row["train"]["waves"] for row in run.server["rounds"]])


@pytest.mark.parametrize(
    ("transport", "protection", "k"),
    [("stream", "none", 0), ("messages", "none", 2), ("stream", "client-head", 1)],
)
def test_a_federation_is_its_centralised_twin(
    tags: Any, run_locally: Any, transport: str, protection: str, k: int
) -> None:
    head = protection == "client-head"
    config = tags(
        split__k=k,
        session__transport=transport,
        labels__protection=protection,
        # A head that each owner trains and the server averages is the twin's with one owner.
        data__owners=1 if head else 3,
        **SGD,
    )
    run = run_locally(config)
    twin, report = _twin(config, run)

    central = {n: p.detach() for n, p in twin.top.named_parameters() if n in run.state}
    assert len(central) >= len(run.state) > 0
    for name, value in central.items():
        assert float((value - run.state[name]).abs().max()) < 1e-5, name
    evaluated = run.server["rounds"][-1]["evaluate"]["metrics"]
    for key, value in report.metrics.items():
        assert evaluated[key] == pytest.approx(value, rel=1e-4), key
    assert {"entity-f1", "strict-entity-f1", "word-accuracy", "accuracy"} <= evaluated.keys()
    assert len(evaluated["entity-f1-by-type"]) == 2


def test_a_step_is_hugging_faces_with_ignored_tokens(
    tags: Any, run_locally: Any, tmp_path: Path, tiny_bert: Path
) -> None:
    config = tags(data__owners=1, train__rounds=1, train__max_steps=1, split__k=1, **SGD)
    twin = CentralisedTwin(config, owner_samples(config, load_base(config).tokenizer))
    model = load_base(config).model.train()
    tokenizer = local_tokenizer(tiny_bert)
    (step, _), *_ = twin.schedule([[["owner-0"]]])
    samples, slots = step[0]
    by_ids = {}
    for words, own in _texts():  # word_ids of the words given one by one is the reference
        listed = tokenizer(words, is_split_into_words=True, truncation=True, max_length=16)
        seen: set[Any] = {None}
        labels = []
        for word in listed.word_ids():
            labels.append(-100 if word in seen else NAMES.index(own[word]))
            seen.add(word)
        by_ids[tuple(listed["input_ids"])] = labels
    rows = [tuple(samples.ids[slot].tolist()) for slot in slots]
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = torch.tensor([[*by_ids[row], *[-100] * (width - len(row))] for row in rows])
    model.zero_grad()
    model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()

    state = run_locally(config).state

    named = dict(model.named_parameters())
    assert len(state) > 30
    for name, value in state.items():
        parameter = named[whole_name(twin.top, name.removeprefix("model."))]
        assert parameter.grad is not None
        assert float((value - parameter.detach() + 0.1 * parameter.grad).abs().max()) < 1e-5, name


def test_reported_entities_are_those_of_all_owners_predictions(tags: Any, run_locally: Any) -> None:
    config = tags(train__rounds=1, model__max_tokens=8)
    run = run_locally(config)
    shares = owner_samples(config, load_base(config).tokenizer)
    twin, _ = _twin(config, run)
    twin.top.load_state_dict(run.state, strict=False)
    true, predicted, cut = [], [], False
    for share in shares:
        assert share.test.words is not None
        for slot, words in enumerate(share.test.words.texts):
            with torch.no_grad():
                rows, _ = twin.logits([(share.test, [slot])])
            own = iter(rows.argmax(1).tolist())
            true.append(words[:, 1].tolist())
            predicted.append([next(own) if at >= 0 else 0 for at in words[:, 0].tolist()])
            cut = cut or -1 in words[:, 0]
    assert cut

    evaluated = run.server["rounds"][-1]["evaluate"]["metrics"]

    for key, value in scores(count(NAMES, true, predicted)).items():
        assert evaluated[key] == pytest.approx(value), key


def test_a_tag_that_was_not_agreed_is_refused_with_its_place(tags: Any, tagged: Path) -> None:
    config = tags(model__labels=4, model__label_names="O,B-a,I-a,B-b")

    with pytest.raises(DataError) as caught:
        owner_samples(config, load_base(config).tokenizer)

    assert "owner-0: " in str(caught.value)
    assert f"{tagged}:" in str(caught.value)
    assert "'I-b': must be one of the agreed classes O, B-a, I-a, B-b" in str(caught.value)


@pytest.mark.parametrize("protection", ["randomised-response", "marvell", "max-norm"])
def test_protections_of_one_class_per_text_are_refused_at_the_start(
    tags: Any, protection: str
) -> None:
    with pytest.raises(ConfigError, match=r"labels\.protection.*not token-classification"):
        tags(labels__protection=protection, model__labels=2, model__label_names="O,B-a")


def test_texts_without_tags_are_refused_by_name(tags: Any, texts: Path) -> None:
    config = tags(data__path=str(texts), data__kind="file")

    with pytest.raises(DataError, match=r"must be a list of tags.*data\.kind=tagged"):
        owner_samples(config, load_base(config).tokenizer)


def test_noise_on_gradients_hides_which_tokens_have_a_target(tags: Any) -> None:
    config = tags(labels__protection="row-noise")
    words = torch.tensor([[1, 1], [3, 2], [-1, 0]])
    samples = Samples((torch.arange(5),), None, (b"x",), words=TaggedWords(NAMES, (words,)))
    logits = torch.randn(5, len(NAMES), generator=torch.Generator().manual_seed(0))
    answers = []
    for shield in (None, _shield(config)):
        reader = OutputReader(samples, classify=False, classes=len(NAMES), exact=True)
        side = LabelSide(reader, task=task_of(config), shield=shield)
        answers.append(side.answer(logits, [0], train=True))
    plain, noisy = answers

    assert plain.weight == noisy.weight == 2  # the word that was cut away has no target
    assert plain.gradient.abs().sum(1).nonzero().flatten().tolist() == [1, 3]
    assert labels_from_logit_gradients(plain.gradient[[1, 3]]).tolist() == [1, 2]  # every tag
    assert bool((noisy.gradient.abs().sum(1) > 0).all())


@pytest.mark.parametrize(
    "rules", ["[labels]\nmax_recovery = 0.9\n", "[measure]\nmax_label_recovery = 0.5\n"]
)
def test_rules_about_labels_take_every_tag_as_read(
    tags: Any, run_locally: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rules: str
) -> None:
    policy = tmp_path / "owner.toml"
    policy.write_text(rules)
    policy.chmod(0o600)
    monkeypatch.setenv("FEDSPLIT_POLICY", str(policy))

    with pytest.raises(FedsplitError):
        run_locally(tags(train__rounds=1))

    rounds = json.loads((tmp_path / "server" / "server.json").read_text())["rounds"]
    lost = rounds[0]["train"]["lost"]
    assert len(lost) == 3
    assert all("PolicyError" in reason for reason in lost.values()), lost


def test_attackers_read_words_whose_tags_are_learnt(tags: Any, run_locally: Any) -> None:
    config = tags(train__rounds=1)
    run = run_locally(config)
    shares = owner_samples(config, load_base(config).tokenizer)

    found = attack_transcript(config, run.folder / "transcript.safetensors", shares, samples=100)

    assert found["embedding_inversion"]["success"] == 1.0


def _whole(config: Any, text: str) -> torch.Tensor:
    """Return the tuned model's probabilities of one text's tokens, computed in one piece."""
    loaded = load_base(config)
    bottom, top = split(loaded.model, config.split.k)
    trainable = make_trainable(top, config.train.method)
    belongs = identity(config, loaded.digest)
    trainable.load(load_trained(Path(config.serving.weights), belongs).top)
    ids = loaded.tokenizer(text, truncation=True, max_length=config.model.max_tokens)["input_ids"]
    with torch.inference_mode():
        found: torch.Tensor = top.eval()(bottom(torch.tensor([ids])))[0].double().softmax(1)
    return found


def _shield(config: Any) -> GradientShield:
    secret = OwnerSecret.for_simulation(0, "owner-0")
    return GradientShield(build_protection(config.labels), secret, 0.0)


def test_a_tuned_model_tags_as_in_one_piece(tags: Any, run_locally: Any, tmp_path: Path) -> None:
    config = tags(split__k=1, train__rounds=1)
    run = run_locally(config)
    weights = {"serving__weights": str(run.folder / "top.safetensors"), "strategy": "serving"}
    config = tags(split__k=1, **weights)
    texts = ["w61  w62 w3", " ".join(["w7"] * 20), "w70"]
    with served(config) as (server, home, _):
        found, task, _ = tag(home, texts)
        (tmp_path / "ask.conll").write_text("w61\nw62\nw3\n\nw70\n")
        asked = ["predict", "--file", str(tmp_path / "ask.conll"), "--home", str(home)]
        said = CliRunner().invoke(app_cli, [*asked, "--out", str(tmp_path / "said.jsonl")])
    assert not server.report.failed

    for (words, rows), text in zip(found, texts, strict=True):
        reference = _whole(config, " ".join(text.split()))
        assert words == text.split()
        for number, row in enumerate(rows):
            if number + 1 >= 15:  # [CLS], 14 words and [SEP] are 16 tokens
                assert row is None
            else:
                assert row is not None
                torch.testing.assert_close(
                    row.double().softmax(0), reference[number + 1], atol=1e-5, rtol=0
                )
    assert said.exit_code == 0, said.output
    lines = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == ["1", "5"]
    first = task.answer_words(*found[0], NAMES)
    assert lines[0]["words"] == first["words"] == ["w61", "w62", "w3"]
    assert lines[0]["tags"] == first["tags"]
    assert set(first["tags"]) <= set(NAMES)


def test_an_exported_run_is_a_hugging_face_folder_that_knows_its_tags(
    tags: Any, run_locally: Any, tmp_path: Path
) -> None:
    config = tags(split__k=1, train__rounds=1, train__method="lora", output__evaluate_every=0)
    run = run_locally(config)

    said = CliRunner().invoke(app_cli, ["export", str(run.folder), "--out", str(tmp_path / "out")])

    assert said.exit_code == 0, said.output
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out" / "model").eval()
    assert [model.config.id2label[i] for i in range(len(NAMES))] == list(NAMES)
    ids = torch.tensor([[2, 7, 64, 65, 3]])
    parts = run.strategy.parts.model
    with torch.no_grad():
        whole_model = model(ids).logits
        bottom = load_base(config).model.bert
        hidden = bottom(ids, output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(
            parts.top.eval()(hidden, torch.ones_like(ids)), whole_model, atol=1e-5, rtol=0
        )
    about = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert about["task_type"] == "TOKEN_CLS"
