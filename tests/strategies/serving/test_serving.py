"""Private inference: what the owner reads is what the whole model says, and nothing else leaves."""

from __future__ import annotations

import csv
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fedsplit.cli import app_cli
from fedsplit.config import RunConfig
from fedsplit.errors import (
    ConfigError,
    DataError,
    FedsplitError,
    ModelError,
    PolicyError,
    SessionError,
)
from fedsplit.models import split
from fedsplit.models.adapters.trainable import make_trainable
from fedsplit.models.trained.weights import identity, load_trained
from fedsplit.owners.serving.generation import sampler
from fedsplit.owners.serving.inference import classify, generate
from fedsplit.owners.serving.offers import take_offer
from fedsplit.wire.authentication import SessionAuthenticator
from strategies.base_model import load_base
from strategies.serving.inference_server import InferenceServer
from strategies.serving.run import Announcer, build_inference_server
from strategies.sessions.transports import StreamTransport
from tests.strategies.local_grid import LocalGrid

TEXTS = ["w1 w2 w3 w4", "w50 w7 w9", "w3 w3 w80 w81 w5 w6 w7 w8", "w11"]


@contextmanager
def served(
    config: RunConfig, *, tokens: int = 8
) -> Iterator[tuple[InferenceServer, Path, Announcer]]:
    """Serve ``config`` on loopback and yield (server, home of owner 0, announcer)."""
    import os

    config = replace(config, strategy="serving", serving=replace(config.serving, tokens=tokens))
    server = build_inference_server(config)
    grid = LocalGrid(config, config.data.owners)
    authenticator = SessionAuthenticator(grid.run_id)
    transport = StreamTransport(
        authenticator,
        host="127.0.0.1",
        port=0,
        tls=None,
        max_frame_bytes=1 << 24,
        on_bytes=None,
    )
    transport.serve(server)
    announcer = Announcer(grid, transport, server)
    announcer.announce()
    try:
        yield server, Path(os.environ["FEDSPLIT_HOME"]) / "owner-0", announcer
    finally:
        transport.close()
        server.close()


def whole(config: RunConfig, texts: list[str]) -> torch.Tensor:
    """Return the tuned model's probabilities, computed in one piece."""
    loaded = load_base(config)
    bottom, top = split(loaded.model, config.split.k)
    trainable = make_trainable(top, config.train.method)
    if config.serving.weights:
        belongs = identity(config, loaded.digest)
        trainable.load(load_trained(Path(config.serving.weights), belongs).top)
    top.eval()
    out = []
    with torch.inference_mode():
        for text in texts:
            ids = loaded.tokenizer(text, truncation=True, max_length=config.model.max_tokens)
            out.append(top(bottom(torch.tensor([ids["input_ids"]]))).softmax(1)[0])
    return torch.stack(out).double()


@pytest.mark.parametrize("protection", ["none", "client-head"])
def test_a_tuned_model_answers_as_in_one_piece(
    make_config: Any, run_locally: Any, protection: str
) -> None:
    config = make_config(labels__protection=protection, split__k=1)
    run = run_locally(config)
    weights = run.folder / "top.safetensors"
    serving = replace(config.serving, weights=str(weights))
    config = replace(config, serving=serving, strategy="serving")
    with served(config) as (server, home, announcer):
        found, answered = classify(home, TEXTS)
        again, _ = classify(home, TEXTS[1:2])
    assert sorted(announcer.owners.values()) == ["owner-0", "owner-1", "owner-2"]
    assert torch.allclose(found[1:2], again, atol=1e-6)
    assert answered.tokens > len(TEXTS)
    assert server.report.texts == len(TEXTS) + 1
    assert not server.report.failed
    untuned = whole(replace(config, serving=replace(serving, weights="")), TEXTS)
    assert not torch.allclose(found, untuned, atol=1e-3)
    if protection == "none":
        assert torch.allclose(found, whole(config, TEXTS), atol=1e-5)
    ledger = (home / "ledger.jsonl").read_text()
    kinds = {json.loads(line).get("kind") for line in ledger.splitlines()}
    assert "representations" in kinds
    assert not any("w50" in line for line in ledger.splitlines())


def test_the_same_question_shows_the_same_noise(make_config: Any) -> None:
    config = make_config(privacy__mechanism="dchi", privacy__eta=5.0)
    with served(config) as (_, home, _announcer):
        first, told = classify(home, TEXTS)
        second, _ = classify(home, list(reversed(TEXTS)))
    assert torch.allclose(first, second.flip(0), atol=1e-6)
    assert not torch.allclose(first, whole(config, TEXTS), atol=1e-3)
    assert "exp(5 *" in told.mechanism


def test_many_owners_at_once_get_their_own_answers(make_config: Any) -> None:
    config = make_config()
    expected = whole(config, TEXTS)
    found: dict[int, torch.Tensor] = {}
    with served(config, tokens=16) as (server, home, _):

        def ask(i: int) -> None:
            found[i] = classify(home, [TEXTS[i % 4]])[0]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.report.sessions == 4
    for i, row in found.items():
        assert torch.allclose(row[0], expected[i % 4], atol=1e-5)


def test_generation_is_the_whole_models_own(make_config: Any, tiny_llama: Path) -> None:
    config = make_config(
        model__name=str(tiny_llama), model__task="causal-lm", split__k=1, data__owners=1
    )
    loaded = load_base(config)
    ids = loaded.tokenizer(TEXTS[0])["input_ids"]
    with torch.inference_mode():
        expected = loaded.model.generate(
            torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0
        )[0, len(ids) :].tolist()
    pieces: list[str] = []
    with served(config) as (server, home, _):
        text, answered = generate(
            home, TEXTS[0], choose=sampler(0.0, 1.0, 0), most=6, on_text=pieces.append
        )
        with pytest.raises(ConfigError, match="sequence-classification"):
            classify(home, TEXTS)
    assert text == loaded.tokenizer.decode(expected, skip_special_tokens=True)
    assert "".join(pieces) == text
    # Every token crossed once: the prompt, and all but the last of those chosen.
    assert answered.tokens == len(ids) + len(expected) - 1 == server.report.tokens


def test_a_question_is_laid_out_by_the_template(
    make_config: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    pytest.importorskip("jinja2")
    folder = tmp_path / "chat"
    shutil.copytree(tiny_llama, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ 'w8 ' ~ m['content'] ~ ' [SEP] ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'w9 ' }}{% endif %}"
    )
    config = make_config(
        model__name=str(folder), model__task="causal-lm", split__k=1, data__owners=1
    )
    ids = [12, 80, 3, 12, 5, 6, 3, 13]  # w8 w76 [SEP] w8 w1 w2 [SEP] w9
    with torch.inference_mode():
        expected = load_base(config).model.generate(
            torch.tensor([ids]), max_new_tokens=4, do_sample=False, pad_token_id=0
        )[0, len(ids) :]
    with served(config) as (_, home, _):
        options: dict[str, Any] = {"choose": sampler(0.0, 1.0, 0), "most": 4, "chat": True}
        text, answered = generate(home, "w1 w2", system="w76", **options)
        with pytest.raises(DataError, match="prompt has 44 tokens: must be <= 16"):
            generate(home, "w1 " * 41, **options)
    assert text == load_base(config).tokenizer.decode(expected, skip_special_tokens=True)
    assert answered.tokens == len(ids) + len(expected) - 1


def test_a_prompt_is_continued_from_its_end_or_not_at_all(
    make_config: Any, tiny_llama: Path
) -> None:
    config = make_config(
        model__name=str(tiny_llama), model__task="causal-lm", data__owners=1, model__max_tokens=8
    )
    choose = sampler(0.0, 1.0, None)
    with served(config) as (server, home, _):
        with pytest.raises(DataError, match=r"prompt has \d+ tokens: must be <= 8"):
            generate(home, "w1 " * 20, choose=choose, most=4)
        assert server.report.tokens == 0
        text, _ = generate(home, "w1 w2", choose=choose, most=4)
        assert text


def test_every_row_of_a_file_is_answered(make_config: Any, tmp_path: Path) -> None:
    config = make_config(data__owners=1, model__max_tokens=5, model__label_names="no,perhaps,yes")
    (tmp_path / "a.csv").write_text('text\nw1 w2\n""\n"w3\nw4"\n" "\nw5 w6 w7 w8 w9\n')
    (tmp_path / "a.txt").write_text("w1 w2\n\nw3\n")
    (tmp_path / "bare.csv").write_text("7|w1 w2\n8|w3\n")
    bare = ("--no-header", "--delimiter", "|", "--column", "2")
    found = {}
    with served(config) as (_, home, _):
        for name, more in (("a.csv", ()), ("a.txt", ()), ("bare.csv", bare)):
            out = tmp_path / f"{name}.out.csv"
            arguments = ["predict", "--file", str(tmp_path / name), "--out", str(out), *more]
            told = CliRunner().invoke(app_cli, [*arguments, "--home", str(home)])
            assert told.exit_code == 0, told.output
            with out.open(newline="") as file:
                found[name] = list(csv.DictReader(file))
            if name == "a.csv":
                assert "2 of 5 rows are blank" in told.output
                assert "1 texts are longer" in told.output
        alone = [float(classify(home, [text])[0].max()) for text in ("w1 w2", "w3")]
    rows = found["a.csv"]
    assert [row["row"] for row in rows] == ["2", "3", "5", "6", "7"]
    assert [row["text"] for row in rows] == ["w1 w2", "", "w3\nw4", "", "w5 w6 w7 w8 w9"]
    assert [row["class"] in ("no", "perhaps", "yes") for row in rows] == [True, False] * 2 + [True]
    assert [row["cut"] for row in rows] == ["0", "0", "0", "0", "1"]
    lines = found["a.txt"]
    assert [row["row"] for row in lines] == ["1", "2", "3"]
    assert [float(lines[i]["probability"]) for i in (0, 2)] == pytest.approx(alone, abs=1e-5)
    assert lines[1]["class"] == lines[1]["probability"] == ""
    assert [row["text"] for row in found["bare.csv"]] == ["w1 w2", "w3"]
    got = [float(row["probability"]) for row in found["bare.csv"]]
    assert got == pytest.approx(alone, abs=1e-5)


def test_what_cannot_be_answered_is_said_before_anything_leaves(
    make_config: Any, tmp_path: Path
) -> None:
    (tmp_path / "odd.jsonl").write_text('{"text": "w1 \\ud800"}\n')
    (tmp_path / "file").write_text("")
    wrong = {
        "must end with .csv or .jsonl": ("w1", "--out", "answers.txt"),
        "is a folder": ("w1", "--out", str(tmp_path / "a.csv")),
        "is no writable folder": ("w1", "--out", str(tmp_path / "file" / "a.csv")),
        "must be 3 names, not 2": ("w1", "--classes", "no,yes"),
        "lone surrogate": ("--file", str(tmp_path / "odd.jsonl")),
        "text has the lone surrogate": ("w1 \udcff",),
        "text that is not blank": ("  ",),
    }
    (tmp_path / "a.csv").mkdir()
    with served(make_config(data__owners=1)) as (server, home, _):
        for reason, arguments in wrong.items():
            told = CliRunner().invoke(app_cli, ["predict", *arguments, "--home", str(home)])
            assert isinstance(told.exception, FedsplitError), (reason, told.output)
            assert reason in str(told.exception)
        assert server.report.tokens == 0
        out = tmp_path / "new folder" / "ä.jsonl"
        told = CliRunner().invoke(
            app_cli, ["predict", "w1", "--out", str(out), "--home", str(home)]
        )
        assert told.exit_code == 0, told.output
        assert len(out.read_text().splitlines()) == 1


def test_rules_and_tokens_hold(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(privacy__mechanism="dchi", privacy__eta=5.0, data__owners=1)
    with served(config, tokens=2) as (_, home, announcer):
        with pytest.raises(DataError, match="texts=0"):
            classify(home, [])
        policy = tmp_path / "owner.toml"
        policy.write_text("[noise]\nmax_eta = 1.0\n")
        policy.chmod(0o600)
        monkeypatch.setenv("FEDSPLIT_POLICY", str(policy))
        with pytest.raises(PolicyError, match="eta"):
            classify(home, TEXTS)
        monkeypatch.delenv("FEDSPLIT_POLICY")
        classify(home, TEXTS)
        with pytest.raises(SessionError, match="tokens are used"):
            classify(home, TEXTS)
        monkeypatch.setenv("FEDSPLIT_POLICY", str(policy))
        announcer._told.clear()
        announcer.announce()
        assert "eta" in next(iter(announcer.refused.values()))
    with pytest.raises(SessionError, match="no model serves"):
        take_offer(tmp_path)


def test_a_checkpoint_of_another_run_is_refused(make_config: Any, run_locally: Any) -> None:
    config = make_config(train__rounds=1)
    weights = str(run_locally(config).folder / "top.safetensors")
    other = replace(config, serving=replace(config.serving, weights=weights))
    with pytest.raises(ModelError, match=r"split\.k"):
        build_inference_server(replace(other, split=replace(config.split, k=1)))
    Path(weights).write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="no readable checkpoint"):
        build_inference_server(other)
