"""The top over several processes: the gradients of one, and the same bits in every run."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError, FedsplitError, RunError
from fedsplit.settings import read_settings
from strategies.split_tuning import replica_worker
from strategies.split_tuning.model import build_replica
from strategies.split_tuning.replica_channel import Channel, trained
from strategies.split_tuning.replicas import Replicas, deal
from strategies.split_tuning.top_step import Forward, ForwardHere, TopRows
from tests.strategies.run_local import run_local
from tests.tiny_models import save_tiny_bert

TEXTS = (2, 3, 1, 2)  # of four owners


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 6))
def test_owners_are_dealt_whole_and_in_order(texts: list[int], workers: int) -> None:
    counts = deal(texts, workers)
    assert len(counts) == workers
    assert sum(counts) == sum(texts)
    assert counts[0] >= texts[0]
    ends = [sum(texts[:n]) for n in range(len(texts) + 1)]
    assert all(sum(counts[:n]) in ends for n in range(workers + 1))
    # No worker has more than an even share and one owner's texts.
    assert max(counts) <= sum(texts) / workers + max(texts)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    flat = {
        "model.name": str(save_tiny_bert(tmp_path_factory.mktemp("bert"))),
        "model.labels": 3,
        "model.max-tokens": 16,
        "split.k": 1,
        "server.workers": 2,
        "output.threads": 1,
    }
    return read_settings(flat)


@pytest.fixture(scope="module")
def rows(config: RunConfig) -> TopRows:
    torch.manual_seed(0)
    return build_replica(config, 0)


@pytest.fixture(scope="module")
def two(config: RunConfig, rows: TopRows) -> Iterator[Replicas]:
    replicas = Replicas(rows, config)
    yield replicas
    replicas.close()


@pytest.fixture
def step() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (B, T, d) of texts of different lengths, their mask, what comes back (B, C)."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([5, 2, 7, 3, 7, 4, 1, 6])
    mask = (torch.arange(7) < lengths[:, None]).long()
    hidden = torch.randn(len(lengths), 7, 32, generator=generator) * mask[..., None]
    return hidden, mask, torch.randn(len(lengths), 3, generator=generator)


def taken(
    forward: Forward, rows: TopRows, step: tuple[Tensor, Tensor, Tensor], joint: bool = False
) -> dict[str, Tensor]:
    """Rows and gradients of one step."""
    hidden, mask, upward = (tensor.clone() for tensor in step)
    forward.train(True)
    rows.top.zero_grad(set_to_none=True)
    one = forward(hidden, mask, TEXTS, learn=True, joint=joint)
    back = one.backward(upward)
    found = {n: p.grad.clone() for n, p in trained(rows.top).items() if p.grad is not None}
    return found | {"rows": one.rows.clone()} | ({} if back is None else {"hidden": back})


def in_order(rows: TopRows, step: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """What two workers must come to, by this process alone: each part, then the sum."""
    counts = deal(TEXTS, 2)
    parts = list(zip(*(torch.split(tensor, counts) for tensor in step), strict=True))
    found = [taken(ForwardHere(rows), rows, part) for part in parts]
    summed = {n: found[0][n] + found[1][n] for n in found[0] if n != "rows"}
    return summed | {"rows": torch.cat([part["rows"] for part in found])}


def test_two_workers_come_to_the_gradients_of_one(
    rows: TopRows, two: Replicas, step: tuple[Tensor, Tensor, Tensor]
) -> None:
    alone, shared = (taken(f, rows, step, joint=True) for f in (ForwardHere(rows), two))
    assert alone.keys() == shared.keys()
    assert {"rows", "hidden"} < alone.keys()
    for name, wanted in alone.items():
        torch.testing.assert_close(shared[name], wanted, rtol=1e-6, atol=1e-6)


def test_they_are_the_sum_in_the_order_of_the_cohort_bit_for_bit(
    rows: TopRows, two: Replicas, step: tuple[Tensor, Tensor, Tensor]
) -> None:
    wanted = in_order(rows, step)
    for _ in range(2):
        found = taken(two, rows, step)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_workers_follow_what_the_optimizer_and_a_rollback_change(
    rows: TopRows, two: Replicas, step: tuple[Tensor, Tensor, Tensor]
) -> None:
    hidden, mask, _ = step
    before = {n: p.detach().clone() for n, p in trained(rows.top).items()}
    for mode in (True, False):
        with torch.no_grad():
            for parameter in trained(rows.top).values():
                parameter.mul_(1.1)
        two.train(mode)
        for _ in range(2):  # the second evaluation sends nothing anew
            shared = two(hidden, mask, TEXTS, learn=False, joint=False).rows
            alone = ForwardHere(rows)(hidden, mask, TEXTS, learn=False, joint=False).rows
            torch.testing.assert_close(shared, alone, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        for name, parameter in trained(rows.top).items():
            parameter.copy_(before[name])


def test_one_owner_is_the_servers_own(rows: TopRows, two: Replicas) -> None:
    hidden, mask = torch.randn(2, 4, 32), torch.ones(2, 4, dtype=torch.long)
    two.train(False)
    shared = two(hidden, mask, (2,), learn=False, joint=False).rows
    alone = ForwardHere(rows)(hidden, mask, (2,), learn=False, joint=False).rows
    assert torch.equal(shared, alone)


def test_a_run_with_two_workers_is_a_run_with_one(make_config: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train__rounds": 1, "output__transcript": False, "data__owners": 3}
    settings |= {"session__wave_wait_s": 120.0, "session__deadline_s": 120.0}
    # AdamW makes steps of a full size of gradients that are rounding alone (keys' biases).
    settings |= {"train__optimizer": "sgd", "train__lr": 0.1}
    alone = run_local(make_config(**settings, output__dir=str(tmp_path / "one")))
    shared = run_local(
        make_config(**settings, server__workers=2, output__dir=str(tmp_path / "two"))
    )
    one, two = alone.state, shared.state
    assert one.keys() == two.keys()
    for name, wanted in one.items():
        torch.testing.assert_close(two[name], wanted, rtol=1e-5, atol=1e-6)
    assert not shared.strategy.parts.forward._processes  # type: ignore[attr-defined]


def test_a_worker_that_is_gone_is_named() -> None:
    mine, other = socket.socketpair()
    channel = Channel(mine, "worker 1 of the top")
    other.sendall(b"\0\0")  # less than a frame
    other.close()
    with pytest.raises(RunError, match="worker 1 of the top is gone"):
        channel.receive()
    with pytest.raises(RunError, match="worker 1 of the top is gone"):
        channel.send({"hidden": torch.zeros(3)}, do="step")
    channel.close()


def test_what_a_worker_cannot_load_is_told(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"run": {**config.to_flat(), "model.name": "/no/such/model"}, "worker": 1}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(told)))
    mine, other = socket.socketpair()
    channel = Channel(mine, "worker 1 of the top")
    with pytest.raises(FedsplitError, match="no/such/model"):
        replica_worker.main(other.detach())
    with pytest.raises(RunError, match=r"worker 1 of the top failed: .*no/such/model"):
        channel.receive()
    channel.close()


def test_frames_carry_every_number_as_it_is() -> None:
    mine, other = socket.socketpair()
    one, two = Channel(mine, "one"), Channel(other, "two")
    sent = {
        "rows": torch.randn(3, 5).T,
        "mask": torch.arange(4),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    }
    one.send(sent, do="step", seed=2**63 - 1, joint=True)
    facts, found = two.receive()
    assert facts == {"do": "step", "seed": 2**63 - 1, "joint": True}
    assert found.keys() == sent.keys()
    assert all(torch.equal(found[n], sent[n]) and found[n].dtype == sent[n].dtype for n in sent)
    one.send(ready=True)
    assert two.receive() == ({"ready": True}, {})
    for channel in (one, two):
        channel.close()


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu,cpu"])
def test_devices_are_one_for_each_worker(devices: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.devices=.*server\.workers=2"):
        read_settings({"server.workers": 2, "server.devices": devices})
    config = read_settings({"server.workers": 2, "server.devices": "cpu,cuda:1"})
    assert [config.server.device_of(n) for n in range(2)] == ["cpu", "cuda:1"]
