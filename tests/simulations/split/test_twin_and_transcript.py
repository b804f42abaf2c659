"""The centralised twin differs from a federation by split, wire and noise alone; so do attacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsplit.attacks.transcripts import read_transcript, read_whole_transcript
from fedsplit.errors import AttackError
from simulations.core.owner_samples import data_digest, owner_samples
from simulations.split.centralised import CentralisedTwin
from simulations.split.transcript_attacks import attack_transcript
from strategies.base_model import load_base


def waves_of(run: Any) -> list[list[list[str]]]:
    return [row["train"]["waves"] for row in run.server["rounds"]]


@pytest.mark.parametrize("schedule", ["parallel", "sequential"])
@pytest.mark.parametrize("k", [0, 2])
def test_without_noise_the_twin_is_the_federation(
    make_config: Any, run_locally: Any, k: int, schedule: str
) -> None:
    # Adam divides by the gradient's size, which makes rounding of zero gradients visible.
    config = make_config(
        split__k=k, session__schedule=schedule, train__optimizer="sgd", train__lr=0.1
    )
    run = run_locally(config)
    twin = CentralisedTwin(config, owner_samples(config, load_base(config).tokenizer))

    report = twin.run(waves_of(run))

    federated = run.state
    central = {n: p.detach() for n, p in twin.top.named_parameters() if n in federated}
    assert central.keys() == federated.keys()
    for name, value in central.items():
        assert float((value - federated[name]).abs().max()) < 1e-5, name
    evaluated = run.server["rounds"][-1]["evaluate"]["metrics"]
    assert report.accuracy == pytest.approx(evaluated["accuracy"])
    assert report.loss == pytest.approx(evaluated["loss"], rel=1e-3)


def test_the_twin_of_a_language_model(make_config: Any, run_locally: Any, tiny_llama: Path) -> None:
    config = make_config(model__name=str(tiny_llama), model__task="causal-lm", split__k=1)
    run = run_locally(config)
    twin = CentralisedTwin(config, owner_samples(config, load_base(config).tokenizer))
    report = twin.run(waves_of(run))
    evaluated = run.server["rounds"][-1]["evaluate"]["metrics"]
    assert report.loss == pytest.approx(evaluated["loss"], rel=1e-3)
    assert report.loss < report.zero_shot_loss


def test_inversion_reads_everything_without_noise_and_less_with_more(
    make_config: Any, run_locally: Any, tmp_path: Path
) -> None:
    success = []
    for eta in (0.0, 5.0, 2.0):
        noise = {"privacy__mechanism": "dchi", "privacy__eta": eta} if eta else {}
        config = make_config(output__dir=str(tmp_path / f"eta-{eta}"), **noise)
        run = run_locally(config)
        shares = owner_samples(config, load_base(config).tokenizer)
        transcript = run.folder / "transcript.safetensors"
        found = attack_transcript(config, transcript, shares, samples=1000)
        success.append(found["embedding_inversion"]["success"])
        assert ("map_inversion" in found) == bool(eta)
    assert success[0] == 1.0
    assert success[0] > success[1] > success[2]


@pytest.mark.parametrize("protection", ["none", "client-head"])
@pytest.mark.parametrize("transport", ["stream", "messages"])
def test_a_language_models_gradients_are_its_text(
    make_config: Any, run_locally: Any, tiny_llama: Path, transport: str, protection: str
) -> None:
    config = make_config(
        model__name=str(tiny_llama),
        model__task="causal-lm",
        split__k=1,
        session__transport=transport,
        labels__protection=protection,
        output__evaluate_every=0,
    )
    run = run_locally(config)
    shares = owner_samples(config, load_base(config).tokenizer)

    # The readers of gradients are the matter here: the one that learns need not learn much.
    found = attack_transcript(
        config,
        run.folder / "transcript.safetensors",
        shares,
        samples=3,
        budget={"learned": {"steps": 2, "public_samples": 50}},
    )

    reader = "closed_form" if protection == "client-head" else "logit_gradients"
    assert {"logit_gradients", "closed_form"} & found.keys() == {reader}
    assert found[reader]["success"] == found[reader]["text_recovery"] == 1.0
    assert found[reader]["guess"] < 0.9
    assert not (run.folder / "capture").exists()
    assert run.server["recorded"]["frames_left_out"] == 0


def test_a_recording_stops_at_its_bound(
    make_config: Any, run_locally: Any, tiny_llama: Path
) -> None:
    config = make_config(
        model__name=str(tiny_llama), model__task="causal-lm", split__k=1, output__record_mb=1
    )
    run = run_locally(config, prepare=lambda grid, strategy: _bound(strategy.recorder, 200_000))

    recorded = run.server["recorded"]
    found = read_whole_transcript(run.folder / "transcript.safetensors")

    assert recorded["bytes"] <= 200_000
    assert recorded["frames_left_out"] > 0
    assert found.answered()
    sent = {key: len(held) for key, held in found.rows[0].items()}
    assert sum(map(len, found.answered().values())) < sum(sent.values())


def _bound(recorder: Any, limit: int) -> None:
    recorder._max = limit


def test_attacks_need_a_transcript(tmp_path: Path) -> None:
    with pytest.raises(AttackError, match="no transcript"):
        read_transcript(tmp_path / "nothing.safetensors")


def test_denoising_changes_what_the_top_reads_and_not_what_was_sent(
    make_config: Any, run_locally: Any, tmp_path: Path
) -> None:
    noise = {"privacy__mechanism": "dchi", "privacy__eta": 10.0, "output__capture": True}
    plain = run_locally(make_config(output__dir=str(tmp_path / "a"), **noise))
    clean = run_locally(
        make_config(output__dir=str(tmp_path / "b"), privacy__denoise="uniform", **noise)
    )
    first, second = (read_transcript(r.folder / "transcript.safetensors") for r in (plain, clean))
    assert first.keys() == second.keys()
    for key, held in first.items():
        for slot, rows in held.items():
            assert bool((rows == second[key][slot]).all())
    assert any(bool((plain.state[n] != clean.state[n]).any()) for n in plain.state)


def test_the_data_digest_depends_on_the_data_alone(make_config: Any) -> None:
    base = data_digest(make_config())
    assert base == data_digest(make_config(train__lr=0.5, privacy__mechanism="none"))
    assert base != data_digest(make_config(data__limit=60))
