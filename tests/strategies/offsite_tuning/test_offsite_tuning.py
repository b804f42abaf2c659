"""Offsite tuning: federated equals centralised, and what an owner sends is checked before use."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error, Message
from safetensors.torch import load_file

from fedsplit.config import RunConfig
from fedsplit.emulators import adapter_state, load_adapters, plug_in
from fedsplit.emulators.files import load_emulator
from fedsplit.emulators.lm import mean_loss
from fedsplit.errors import ConfigError, RunError
from fedsplit.owners.offsite.owner import AdapterOwner
from fedsplit.wire.messages import SessionOffer
from simulations.runtime.federated import read_server
from simulations.runtime.local_run import run_in_process
from strategies.base_model import load_base
from strategies.offsite_tuning.emulator import importance_for, make_emulator, public_blocks
from strategies.rounds.client_manager import ClientManager
from strategies.rounds.lineage_watch import LineageWatch
from tests.strategies.local_grid import LocalGrid
from tests.strategies.offsite_union import train_on_the_union


def run(config: RunConfig, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], Path]:
    _, server = run_in_process(config, folder)
    path = folder / "server"
    return load_file(path / "adapters.safetensors"), server, path


def test_one_local_step_per_round_is_one_step_on_the_union(offsite: Any, tmp_path: Path) -> None:
    config = offsite()
    federated, server, folder = run(config, tmp_path / "run")

    emulator = load_emulator(folder / "emulator")
    start = adapter_state(emulator)
    train_on_the_union(config, emulator.model, emulator.adapter_parameters().values())
    central = adapter_state(emulator)

    assert central.keys() == federated.keys()
    moved = max(float((central[n] - start[n]).abs().max()) for n in central)
    assert moved > 1e-3
    for name, value in central.items():
        assert float((value - federated[name]).abs().max()) < 1e-5, name
    assert len(server["rounds"]) == 3
    assert all("plug_in_loss" in row for row in server["rounds"])


def test_the_exported_model_is_the_plugged_in_one(offsite: Any, tmp_path: Path) -> None:
    config = offsite(train__rounds=1, train__max_steps=4, offsite__positions="2")
    adapters, server, folder = run(config, tmp_path / "run")
    exported = load_base(replace(config, model=replace(config.model, name=str(folder / "model"))))
    base = load_base(config)
    emulator = load_emulator(folder / "emulator")
    plug_in(base.model, adapters, emulator.plan)
    ids = torch.arange(24).view(2, 12) % 60
    with torch.inference_mode():
        assert torch.allclose(base.model(ids).logits, exported.model(ids).logits, atol=1e-6)
    load_adapters(emulator, adapters)
    assert server["emulator"]["adapters"] == [2]
    assert mean_loss(emulator.model, ids) != pytest.approx(mean_loss(base.model, ids), abs=1e-6)


def test_the_emulator_crosses_once(offsite: Any, tmp_path: Path) -> None:
    config = offsite()
    _, server, _ = run(config, tmp_path / "run")
    sent = [row["train"]["emulators_sent"] for row in server["rounds"]]
    assert sent == [2, 2, 2]
    assert all(row["train"]["finished"] == ["owner-0", "owner-1"] for row in server["rounds"])


SCALEOT = {
    "offsite__compressor": "scaleot",
    "offsite__positions": "",
    "offsite__adapters": 1,
    "offsite__alpha": 0.5,
    "offsite__importance_steps": 6,
    "offsite__settle_steps": 2,
}


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the folder of a run with a settled emulator is, once one was made."""
    return tmp_path_factory.mktemp("settled") / "run"


@pytest.fixture
def restarted(offsite: Any, settled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run with a settled emulator; a second start finds the server's folder."""
    if not settled.exists():
        run(offsite(**SCALEOT, train__rounds=1), settled)
    shutil.copytree(settled, tmp_path / "run")
    real = shutil.rmtree

    def spare(path: Any, **options: Any) -> None:
        if Path(path).name != "server":
            real(path, **options)

    monkeypatch.setattr("simulations.runtime.local_run.shutil.rmtree", spare)
    return lambda **overrides: run(
        offsite(**SCALEOT | {"train__rounds": 1} | overrides), tmp_path / "run"
    )


def test_a_restarted_server_keeps_the_emulator_that_owners_have(
    restarted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_server(tmp_path / "run" / "server")["emulator"]

    def never(*_: Any) -> Any:
        raise AssertionError("built again")

    monkeypatch.setattr("strategies.offsite_tuning.emulator.make_emulator", never)
    _, server, _ = restarted()
    assert server["emulator"] == before | {"kept": True}


@pytest.mark.parametrize(
    "overrides",
    [
        {"offsite__beta": 0.5},
        {"offsite__settle_steps": 3},
        {"offsite__block": 9},  # other public text
        {"offsite__compressor": "layerdrop", "offsite__keep": 1},
    ],
)
def test_an_emulator_of_other_settings_or_text_is_not_kept(
    restarted: Any, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    before = read_server(tmp_path / "run" / "server")["emulator"]["digest"]
    _, server, _ = restarted(**overrides)
    assert not server["emulator"]["kept"]
    assert server["emulator"]["digest"] != before


@pytest.mark.parametrize("name", ["emulator/emulator.safetensors", "emulator-recipe.json"])
def test_a_damaged_emulator_is_built_again(restarted: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / "run" / "server" / name
    path.write_bytes(path.read_bytes()[:-3])
    _, server, folder = restarted()
    assert not server["emulator"]["kept"]
    load_emulator(folder / "emulator", expected_digest=server["emulator"]["digest"])


def test_the_same_seed_samples_the_same_owners(offsite: Any, tmp_path: Path) -> None:
    config = offsite(data__owners=4, train__fraction=0.5, train__min_owners=1, train__rounds=4)
    sampled = []
    for first in (1000, 77_000):  # node ids are random in every run, owners' names are not
        folder = replace(config, output=replace(config.output, dir=str(tmp_path / str(first))))
        grid = LocalGrid(folder, 4, first=first)
        nodes = dict(sorted(grid.nodes.items(), reverse=first > 1000))
        grid.nodes = {first + i: owner for i, owner in enumerate(nodes.values())}
        clients = ClientManager(folder, LineageWatch(folder.lineage, None))
        rounds = [clients.sample(grid, number) for number in range(1, 5)]
        sampled.append([[grid.nodes[node] for node in nodes] for nodes in rounds])
    assert sampled[0] == sampled[1]
    assert all(len(owners) == 2 for owners in sampled[0])


def test_a_damaged_emulator_is_fetched_again(
    offsite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, damaged = AdapterOwner.evaluate, []

    def evaluate(self: AdapterOwner) -> Any:
        if not damaged and self.name == "owner-0":
            (weights,) = (tmp_path / "run").glob("homes/owner-0/emulators/*/*.safetensors")
            weights.write_bytes(weights.read_bytes()[:-1])
            damaged.append(weights)
        return honest(self)

    monkeypatch.setattr(AdapterOwner, "evaluate", evaluate)
    _, server, _ = run(offsite(train__rounds=2), tmp_path / "run")
    assert damaged
    assert [row["train"]["emulators_sent"] for row in server["rounds"]] == [2, 3]
    assert not server["rounds"][1]["train"]["lost"]


@pytest.mark.parametrize(
    ("averaging", "owners"),
    [
        ("fedadam", 3),
        ("fedmedian", 3),
        ("fedtrimmedavg", 3),
        ("krum", 5),
        ("multikrum", 5),
        ("bulyan", 7),
    ],
)
def test_any_flower_averaging_works(
    offsite: Any, tmp_path: Path, averaging: str, owners: int
) -> None:
    config = offsite(offsite__averaging=averaging, train__rounds=2, data__owners=owners)
    adapters, server, folder = run(config, tmp_path / "run")
    start = adapter_state(load_emulator(folder / "emulator"))
    assert any(not torch.equal(adapters[n], start[n]) for n in adapters)
    assert all(bool(t.isfinite().all()) for t in adapters.values())
    assert not server["rounds"][-1]["train"]["lost"]


def test_proximal_keeps_adapters_near(offsite: Any, tmp_path: Path) -> None:
    def distance(mu: float) -> float:
        config = offsite(offsite__proximal=mu, train__rounds=1, train__max_steps=6)
        adapters, _, folder = run(config, tmp_path / f"mu{mu}")
        start = adapter_state(load_emulator(folder / "emulator"))
        return sum(float((adapters[n] - start[n]).pow(2).sum()) for n in adapters)

    assert distance(5.0) < 0.8 * distance(0.0)


def test_nan_from_one_owner_costs_that_owner(
    offsite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = AdapterOwner.weights

    def weights(self: AdapterOwner) -> dict[str, torch.Tensor]:
        found = honest(self)
        if self.name == "owner-1":
            next(iter(found.values())).view(-1)[0] = float("nan")
        return found

    monkeypatch.setattr(AdapterOwner, "weights", weights)
    adapters, server, _ = run(offsite(data__owners=3), tmp_path / "run")
    assert all(bool(t.isfinite().all()) for t in adapters.values())
    for row in server["rounds"]:
        assert row["train"]["lost"].keys() == {"owner-1"}
        assert "finite" in row["train"]["lost"]["owner-1"]
        assert row["train"]["finished"] == ["owner-0", "owner-2"]


def test_an_owner_that_went_offline_is_lost_by_its_name(
    offsite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = LocalGrid._work

    def gone_in_round_2(self: LocalGrid, message: Message, replies: list[Message]) -> None:
        here = (
            self.nodes[message.metadata.dst_node_id] == 1
            and message.metadata.message_type == "train"
        )
        if not here or SessionOffer.from_content(message.content).round != 2:
            work(self, message, replies)
            return
        # What the SuperLink answers for a node without a heartbeat: its own id is the sender's.
        error = Message(Error(code=5, reason="Node Unavailable"), reply_to=message)
        error.metadata.__dict__["_src_node_id"] = 1
        replies.append(error)

    monkeypatch.setattr(LocalGrid, "_work", gone_in_round_2)
    _, server, _ = run(offsite(data__owners=3), tmp_path / "run")
    lost = [row["train"]["lost"] for row in server["rounds"]]
    assert [list(found) for found in lost] == [[], ["owner-1"], []]
    assert "Node Unavailable" in lost[1]["owner-1"]


@pytest.mark.parametrize(
    ("overrides", "error", "told"),
    [
        ({"model__task": "sequence-classification"}, ConfigError, "causal-lm"),
        ({"offsite__compressor": "zip"}, ConfigError, "zip"),
        ({"offsite__positions": "0,9"}, ConfigError, "9"),
        ({"offsite__block": 4096}, RunError, "one block"),
    ],
)
def test_what_cannot_work_says_so(
    offsite: Any, tmp_path: Path, overrides: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises((error, Exception), match=told):
        run(offsite(**overrides), tmp_path / "run")


@pytest.mark.parametrize("rank_by", ["costs", "scores"])
@pytest.mark.parametrize("compressor", ["scaleot", "gradot", "layerdrop"])
def test_importance_places_the_adapters_of_any_compressor(
    offsite: Any, rank_by: str, compressor: str
) -> None:
    settings = SCALEOT | {"offsite__compressor": compressor, "offsite__rank_by": rank_by}
    if compressor != "scaleot":
        settings |= {"offsite__positions": "importance", "offsite__beta": 0.2}
    config = offsite(**settings)
    base = load_base(config)
    tokens, _ = public_blocks(config, base.tokenizer)
    importance = importance_for(config, base, tokens[:32], None)
    assert importance is not None
    ranks = getattr(importance, rank_by)
    emulator, _ = make_emulator(config, base, tokens[:32], None)
    assert emulator.plan.adapters == (max(range(len(ranks)), key=lambda i: ranks[i]),)


def test_an_importance_run_of_other_text_is_not_gone_on_with(offsite: Any, tmp_path: Path) -> None:
    config = offsite(**SCALEOT)
    base = load_base(config)
    tokens = torch.randint(5, 60, (64, 8), generator=torch.Generator().manual_seed(0))

    def costs(text: torch.Tensor, folder: Path | None) -> tuple[float, ...]:
        found = importance_for(config, base, text, folder)
        assert found is not None
        return found.costs

    folder = tmp_path / "importance"
    first = costs(tokens[:32], folder)
    fresh = costs(tokens[32:], None)
    assert costs(tokens[32:], folder) == fresh != first
    assert costs(tokens[32:], folder) == fresh  # resumed


def test_server_json_tells_what_was_built(offsite: Any, tmp_path: Path) -> None:
    _, _, folder = run(offsite(train__rounds=1), tmp_path / "run")
    server = read_server(folder)
    emulator = server["emulator"]
    assert emulator["bytes"] == sum(p.stat().st_size for p in (folder / "emulator").iterdir())
    assert 0 < emulator["trained_parameters"] < emulator["emulator_parameters"]
    assert json.dumps(server["rounds"][0]["lineage"]["verdict"]) == '"in_lineage"'
