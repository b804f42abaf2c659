"""Many owners in a few hosts: the same model as one at a time, and a lost host costs its owners."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict
from safetensors.torch import load_file

from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError, RunError
from fedsplit.owners.split import prepare
from fedsplit.settings import read_settings
from simulations.runtime.federated import simulate
from simulations.runtime.hosts.host_grid import HostGrid, HostLost
from simulations.runtime.hosts.launch import HostedSimulation
from simulations.runtime.hosts.owner_host import HostSettings, Order, OwnerHost
from simulations.runtime.hosts.ray_hosts import places
from simulations.runtime.hosts.server import KINDS, reachable
from simulations.runtime.local_grid import LocalGrid
from simulations.runtime.machine import machine_cores
from simulations.runtime.watchdog import marked_processes
from tests.tiny_models import save_texts, save_tiny_bert, save_tiny_llama

OWNERS, WAVE = 6, 4
SPLIT = {"data.owners": OWNERS, "session.wave": WAVE, "train.max-steps": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "frozen": {"privacy.mechanism": "dchi", "privacy.eta": 40.0},
    "joint": {"split.bottom": "joint"},
    "sampled": {"train.fraction": 0.5, "labels.protection": "client-head"},
    "offsite": {"strategy": "offsite-tuning"},
}


class InProcess:
    """A host in this process; it is gone after so many replies, if it is told to be."""

    def __init__(self, name: str, settings: HostSettings, homes: Path, lasts: int = 10**9) -> None:
        self.name = name
        self.host = OwnerHost(settings, homes)
        self.lasts = lasts
        self.orders: list[Order] = []

    def answer(self, orders: Sequence[Order]) -> Iterator[list[Message]]:
        self.orders += orders
        for replies in self.host.answer(orders):
            for reply in replies:
                if self.lasts == 0:
                    raise HostLost("the cable")
                self.lasts -= 1
                yield [reply]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("material")
    return {
        "bert": str(save_tiny_bert(folder / "bert")),
        "llama": str(save_tiny_llama(folder / "llama")),
        "texts": str(save_texts(folder / "texts.jsonl", 96)),
    }


@pytest.fixture
def settings(material: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("FEDSPLIT_SIMULATION", "1")
    monkeypatch.setenv("FEDSPLIT_HOME", str(tmp_path / "homes"))
    monkeypatch.setenv("FEDSPLIT_SIMULATION_SHARED", str(tmp_path / "shared"))

    def make(name: str, **more: Any) -> RunConfig:
        flat = {
            "model.name": material["bert"],
            "model.labels": 3,
            "model.max-tokens": 16,
            "train.rounds": 2,
            "train.batch-size": 4,
            "train.lr": 1e-2,
            "data.kind": "file",
            "data.path": material["texts"],
            "data.partition": "iid",
            "session.codec": "fp32",
            "session.wave-wait-s": 120.0,
            "session.deadline-s": 120.0,
            "session.reconnect-s": 0.5,
            "output.dir": str(tmp_path / name),
            "output.threads": 1,
            "lineage.gate": "off",
            **SPLIT,
        }
        if more.get("strategy") == "offsite-tuning":
            flat |= {
                "model.name": material["llama"],
                "model.task": "causal-lm",
                "offsite.compressor": "layerdrop",
                "offsite.positions": "0,2",
                "offsite.keep": 1,
                "offsite.settle-steps": 0,
                "offsite.block": 8,
            }
        return read_settings(flat | more)

    return make


def carry_out(config: RunConfig, grid: Any, *, shared: bool) -> dict[str, torch.Tensor]:
    """Run the strategy over a grid, and return what it has trained."""
    torch.manual_seed(config.seed)
    with KINDS[config.strategy].open(config, run_id=grid.run_id) as strategy:
        if shared:
            out = strategy.handed_out
            for host in grid.hosts:
                host.host.keep(out.kind, out.digest, dict(out.files))
        strategy.start(grid)
    folder = Path(config.output.dir)
    found = [*folder.glob("top.safetensors"), *folder.glob("adapters.safetensors")]
    return {n: t for path in found for n, t in load_file(path).items()}


def hosted(config: RunConfig, homes: Path, **lasts: int) -> Any:
    """Return a grid over two hosts; ``b=3``: host b is gone after three replies."""
    told = HostSettings(config, 7, WAVE)
    hosts = [InProcess(n, told, homes, lasts.get(n, 10**9)) for n in ("a", "b")]
    return HostGrid(hosts, config.data.owners, 7)


def server(config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(config.output.dir) / "server.json").read_text())
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_hosts_give_the_model_that_owners_one_by_one_give(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    config = settings("hosted", **VARIANTS[variant])
    grid = hosted(config, tmp_path / "homes")

    many = carry_out(config, grid, shared=True)

    monkeypatch.setenv("FEDSPLIT_HOME", str(tmp_path / "other-homes"))
    monkeypatch.delenv("FEDSPLIT_SIMULATION_SHARED")
    config = settings("alone", **VARIANTS[variant])
    alone = carry_out(config, LocalGrid(config, OWNERS), shared=False)
    assert many.keys() == alone.keys()
    assert many
    assert all(torch.equal(many[name], alone[name]) for name in many)


def test_a_batch_for_each_host_and_nobody_is_asked_for_its_name(
    settings: Any, tmp_path: Path
) -> None:
    config = settings("run", **{"train.rounds": 1, "output.evaluate-every": 0})
    grid = hosted(config, tmp_path / "homes")

    carry_out(config, grid, shared=True)

    orders = {host.name: host.orders for host in grid.hosts}
    assert {o.message.metadata.message_type for name in orders for o in orders[name]} == {"train"}
    # Waves of 4 and 2: each host gets half of each, and sends at most a list for each reply.
    assert {name: len(found) for name, found in orders.items()} == {"a": 3, "b": 3}
    assert 4 < grid.batches <= 4 + OWNERS
    # What is received is kept once; what is an owner's own is in its own home.
    homes = sorted(path.name for path in (tmp_path / "homes").iterdir())
    assert homes == [f"owner-{i}" for i in range(OWNERS)]
    assert not list((tmp_path / "homes").glob("*/bottoms"))
    assert len(list((tmp_path / "shared" / "bottoms").iterdir())) == 1


def test_a_lost_host_costs_its_owners_part_of_a_round_and_no_more(
    settings: Any, tmp_path: Path
) -> None:
    config = settings("run", **{"train.rounds": 3, "output.evaluate-every": 0})
    # Host b has three of the six owners: it is gone after round 1 and one reply of round 2's first
    # wave, so that owner 5, whose turn comes in the second, works in the other host already.
    grid = hosted(config, tmp_path / "homes", b=4)

    carry_out(config, grid, shared=True)

    first, second, third = [row["train"] for row in server(config)["rounds"]]
    assert first["lost"] == {}
    assert len(second["lost"]) == 1
    assert set(second["lost"]) <= {"owner-1", "owner-3"}
    assert third["lost"] == {}
    assert len(third["metrics"]["owners"]) == OWNERS
    assert [host.name for host in grid.hosts] == ["a"]


def test_without_a_host_the_run_ends_with_the_reason(settings: Any, tmp_path: Path) -> None:
    config = settings("run", **{"output.evaluate-every": 0})
    grid = hosted(config, tmp_path / "homes", a=0, b=0)
    with pytest.raises(RunError, match=r"no owner took a step|hosts left=0: must be >= 1"):
        carry_out(config, grid, shared=True)


def test_what_is_handed_out_must_be_what_its_digest_says(settings: Any, tmp_path: Path) -> None:
    host = OwnerHost(HostSettings(settings("run"), 7, 1), tmp_path / "homes")
    with pytest.raises(RunError, match="digest"):
        host.keep("bottoms", "0" * 64, {"config.json": b"{}"})
    assert not list((tmp_path / "shared" / "bottoms").glob("0*"))


def test_an_owner_that_breaks_does_not_hold_up_the_others(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(message: Message, context: Any) -> Message:
        raise MemoryError("a secret of the owner's")

    monkeypatch.setattr("simulations.runtime.hosts.owner_host.answer", broken)
    grid = hosted(settings("run"), tmp_path / "homes")
    nodes = list(grid.get_node_ids())
    asked = [Message(RecordDict(), dst_node_id=node, message_type="train") for node in nodes]

    replies = list(grid.send_and_receive(asked, timeout=20.0))

    assert sorted(reply.metadata.src_node_id for reply in replies) == sorted(nodes)
    assert {reply.error.reason for reply in replies} == {"MemoryError"}


class Torn:
    """A host whose code breaks after its first replies."""

    name = "torn"

    def answer(self, orders: Sequence[Order]) -> Iterator[list[Message]]:
        yield [Message(RecordDict(), reply_to=orders[0].message)]
        raise ValueError("a defect")


def test_replies_that_came_before_a_host_failed_count_and_nobody_waits_for_the_rest() -> None:
    grid = HostGrid([Torn()], 3, 7)
    nodes = list(grid.get_node_ids())
    asked = [Message(RecordDict(), dst_node_id=node, message_type="train") for node in nodes]

    replies = list(grid.send_and_receive(asked, timeout=20.0))

    assert [reply.has_error() for reply in replies].count(False) == 1
    told = {reply.error.reason for reply in replies if reply.has_error()}
    assert told == {"host torn of this owner failed: ValueError"}
    assert len(replies) == 3
    assert [host.name for host in grid.hosts] == ["torn"]


def node(name: str, cpus: float) -> dict[str, Any]:
    return {"NodeID": name, "Resources": {"CPU": cpus} if cpus else {}}


def test_hosts_are_dealt_to_the_nodes_of_a_cluster_in_turn() -> None:
    assert places([node("b", 1), node("a", 3), node("c", 0)]) == ["a", "b", "a", "a"]
    assert len(places([node("a", 1000)])) == 16
    with pytest.raises(RunError, match="cluster of 1 nodes: must have a CPU"):
        places([node("a", 0)])


@pytest.mark.parametrize(
    ("nodes", "host", "wanted"),
    [
        ({"10.0.0.1"}, "127.0.0.1", "127.0.0.1"),
        ({"10.0.0.1", "127.0.0.1"}, "127.0.0.1", "127.0.0.1"),
        ({"10.0.0.1", "10.0.0.2"}, "127.0.0.1", "10.0.0.1"),
        ({"10.0.0.1", "10.0.0.2"}, "0.0.0.0", "0.0.0.0"),
    ],
)
def test_the_session_server_listens_where_the_clusters_owners_reach_it(
    settings: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nodes: set[str],
    host: str,
    wanted: str,
) -> None:
    module = "simulations.runtime.hosts.server"
    monkeypatch.setattr(f"{module}.addresses", lambda: nodes)
    monkeypatch.setattr(f"{module}.own_address", lambda: "10.0.0.1")
    for name in ("CERT", "KEY", "CA"):
        monkeypatch.setenv(f"FEDSPLIT_TLS_{name}", "")  # put back after the test
        monkeypatch.delenv(f"FEDSPLIT_TLS_{name}")

    config = reachable(settings("run", **{"session.host": host}), tmp_path)

    assert config.session.host == wanted
    assert ("FEDSPLIT_TLS_CERT" in os.environ) == (wanted == "10.0.0.1")


def test_what_a_simulation_cannot_be_is_refused(settings: Any, tmp_path: Path) -> None:
    config = settings("run")
    with pytest.raises(ConfigError, match="engine='x': must be one of"):
        simulate(config, tmp_path, engine="x")
    with pytest.raises(ConfigError, match="ray_address='a:1': must be empty with engine=flower"):
        simulate(config, tmp_path, engine="flower", ray_address="a:1")
    with pytest.raises(ConfigError, match="strategy='serving'"):
        simulate(replace(config, strategy="serving"), tmp_path)
    with pytest.raises(ConfigError, match="owners=0: must be >= 1"):
        HostedSimulation(0, log_dir=tmp_path)
    for wrong in (0.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="cpus_per_client"):
            HostedSimulation(4, cpus_per_client=wrong, log_dir=tmp_path)


def test_hosts_are_at_most_one_for_each_core_and_owner(tmp_path: Path) -> None:
    cores = machine_cores()
    assert HostedSimulation(1000, cpus_per_client=0.01, log_dir=tmp_path).hosts == cores
    assert HostedSimulation(1000, cpus_per_client=cores, log_dir=tmp_path).hosts == 1
    assert HostedSimulation(1, cpus_per_client=0.5, log_dir=tmp_path).hosts == 1


def test_a_cluster_gets_the_callers_token_and_nothing_else_of_rays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 64)
    monkeypatch.setenv("RAY_ADDRESS", "somebody:1")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    theirs = HostedSimulation(4, log_dir=tmp_path, address="a:1")
    own = HostedSimulation(4, log_dir=tmp_path)
    wanted = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 64}
    assert theirs._credentials() == wanted
    assert own._credentials().keys() == wanted.keys()
    assert own._credentials()["RAY_AUTH_TOKEN"] != "t" * 64


def test_a_run_that_fails_says_why_and_leaves_no_process(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulations.runtime.hosts.launch.SERVER", "no.such.module")
    lines: list[str] = []
    simulation = HostedSimulation(2, log_dir=tmp_path / "log")
    with simulation:
        mark = simulation.processes.mark
        with pytest.raises(RunError, match=r"serverapp: the run failed \(exit code 1\)"):
            simulation.run(settings("run"), tmp_path, on_line=lambda line: lines.append(line.text))
    assert any("No module named" in line for line in lines)
    assert marked_processes(mark) == []


def test_owners_of_a_process_use_a_tokenizer_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its truncation is the last asked for: a second thread would change the first one's."""
    inside: list[int] = []
    most: list[int] = []

    def busy(task: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return task

    monkeypatch.setattr(prepare, "_build_split_owner", busy)
    monkeypatch.setattr(prepare, "_inference_parts", busy)
    entries: list[Any] = [prepare.build_split_owner, prepare.inference_parts] * 3
    threads = [threading.Thread(target=entry, args=(None,)) for entry in entries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6
