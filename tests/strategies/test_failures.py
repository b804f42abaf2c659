"""What goes wrong at one owner costs that owner's contribution and nothing else."""

from __future__ import annotations

import errno
import json
import logging
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message

from fedsplit import client_work
from fedsplit.config import RunConfig
from fedsplit.errors import (
    ConfigError,
    LineageError,
    ModelError,
    RunError,
    UnsupportedModelError,
)
from fedsplit.owners.head import LabelSide
from fedsplit.wire.frames import Kind
from fedsplit.wire.messages import REPORT, WEIGHTS
from strategies.optimisation import Optimisation
from strategies.recorder import Recorder
from strategies.round import Round
from strategies.split_tuning import SplitTuning
from tests.owners.interfere import Outgoing, Tamper, tamper_with
from tests.strategies.local_grid import HANDLERS, LocalGrid
from tests.strategies.run_local import LocalRun

VICTIM = 1
OTHERS = ["owner-0", "owner-2"]
QUICK: dict[str, Any] = {
    "train__max_steps": 2,
    "train__rounds": 1,
    "output__evaluate_every": 0,
    "lineage__gate": "off",
    "session__wave_wait_s": 60.0,
    "session__deadline_s": 60.0,
    "session__reconnect_s": 1.0,
}


def hurry(monkeypatch: pytest.MonkeyPatch, after: dict[int, set[int]]) -> None:
    """Stop waiting for those that never come once the others are there, however slow they were.

    Args:
        monkeypatch: undoes it.
        after: round -> counts of greeted owners from which on nobody is waited for, until the next
            wave is asked.
    """
    greet, ask = Round.greet, Round.ask
    greeted: dict[Round, int] = {}

    def asked(self: Round, nodes: Any) -> None:
        ask(self, nodes)
        self._wait_s = 60.0

    def one_more(self: Round, *args: Any, **options: Any) -> None:
        greet(self, *args, **options)
        with self._change:
            greeted[self] = greeted.get(self, 0) + 1
            if greeted[self] in after.get(self.number, ()):
                self._wait_s = 0.2
                self._change.notify_all()

    monkeypatch.setattr(Round, "ask", asked)
    monkeypatch.setattr(Round, "greet", one_more)


@pytest.fixture(scope="module", autouse=True)
def warm(tiny_bert: Path) -> None:
    """Load what the first session of a process would have to wait for."""
    from fedsplit.models.halves import split
    from fedsplit.models.loading import load

    split(load(str(tiny_bert), "sequence-classification", num_labels=3).model, 0)


def assert_only_the_victim_is_lost(
    run: LocalRun, reason: str, *, name: str = "owner-1", row: int = 0, steps: int = 2
) -> None:
    train = run.server["rounds"][row]["train"]
    assert list(train["lost"]) == [name], train["lost"]
    assert reason in train["lost"][name]
    assert train["finished"] == OTHERS
    assert train["steps"] == steps
    assert sorted(train["metrics"]["owners"]) == OTHERS
    assert all(bool(torch.isfinite(value).all()) for value in run.state.values())


# ---- frames that no honest owner sends ----------------------------------------------------------


def _floats(outgoing: Outgoing, value: float, at: int = 0) -> None:
    """Put ``value`` among the frame's fp32 numbers."""
    outgoing.body = outgoing.body[: 4 * at] + struct.pack("<f", value) + outgoing.body[4 * at + 4 :]


def _nan_rows(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        _floats(outgoing, float("nan"), at=5)


def _infinite_rows(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        _floats(outgoing, float("-inf"))


def _huge_rows(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        _floats(outgoing, 1e30)


def _nan_gradient(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.GRAD, 1):
        _floats(outgoing, float("nan"))


def _huge_gradient(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.GRAD, 1):
        _floats(outgoing, 1e9)


def _short_gradient(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.GRAD):
        outgoing.body = outgoing.body[:-4]


def _heavy_gradient(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.GRAD):
        outgoing.header["weight"] = 1e6


def _weightless_gradient(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.GRAD):
        outgoing.header["weight"] = 0.0


def _foreign_codec(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.GRAD):
        outgoing.header["codec"] = "fp8"


def _other_dtype(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        outgoing.header["codec"] = "bf16"


def _wrong_width(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        outgoing.header["dim"] *= 2


def _wrong_lengths(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        outgoing.header["lengths"][0] += 1


def _over_long_sample(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        outgoing.header["lengths"][0] = 17  # model.max-tokens is 16


def _empty_batch(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        outgoing.header |= {"slots": [], "fresh": [], "lengths": []}
        outgoing.body = b""


def _duplicate_slots(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        outgoing.header["slots"][1] = outgoing.header["slots"][0]


def _duplicate_fresh(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        outgoing.header["fresh"][1] = outgoing.header["fresh"][0]


def _foreign_slot(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        outgoing.header["slots"][0] = outgoing.header["fresh"][0] = 10_000


def _never_sent_slot(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        outgoing.header |= {"fresh": [], "lengths": [], "dim": 0}
        outgoing.body = b""


def _later_step(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        outgoing.header["step"] = 1


def _gradient_of_another_step(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.GRAD):
        outgoing.header["step"] = 1


def _repeated_frame(outgoing: Outgoing) -> bool:
    outgoing.send()
    if outgoing.at(Kind.BATCH):
        outgoing.send(sequence=outgoing.sequence)
    return True


def _skipped_frame(outgoing: Outgoing) -> bool:
    outgoing.send(outgoing.sequence + (outgoing.kind is Kind.BATCH))
    return True


def _endless_batches(outgoing: Outgoing) -> None:
    if outgoing.kind is Kind.BATCH:
        outgoing.header["last"] = False


def _early_end(outgoing: Outgoing) -> None:
    if outgoing.kind is Kind.BATCH:
        outgoing.header["last"] = True


def _done_for_gradient(outgoing: Outgoing) -> bool:
    if outgoing.at(Kind.GRAD):
        outgoing.kind, outgoing.header = Kind.DONE, {"samples": 1, "steps": 1}
    outgoing.send()
    return True


def _no_batches(outgoing: Outgoing) -> None:
    if outgoing.kind is Kind.READY:
        outgoing.header["batches"] = 0


def _countless_samples(outgoing: Outgoing) -> None:
    if outgoing.kind is Kind.READY:
        outgoing.header["samples"] = 1 << 40


def _garbage(outgoing: Outgoing) -> bool | None:
    if not outgoing.at(Kind.BATCH):
        return None
    outgoing.link.put(outgoing.link.outbox, b"\x80\x04\x95 no frame at all " * 4)
    return True


TAMPERED: dict[str, tuple[Tamper, str]] = {
    "NaN representations": (_nan_rows, "must be finite"),
    "infinite representations": (_infinite_rows, "must be finite"),
    "huge representations": (_huge_rows, "must be finite and <= 1e+06"),
    "NaN gradient": (_nan_gradient, "must be finite"),
    "huge gradient": (_huge_gradient, "must be finite and <= 1000"),
    "gradient of a wrong shape": (_short_gradient, "bytes: must be"),
    "gradient of too much weight": (_heavy_gradient, "GRAD weight 1000000.0: must be in (0, 4]"),
    "gradient of no weight": (_weightless_gradient, "GRAD weight 0.0: must be in"),
    "unknown codec": (_foreign_codec, "codec='fp8': must be one of"),
    "another dtype": (_other_dtype, "bytes: must be"),
    "wrong width": (_wrong_width, "BATCH width 64: must be 32"),
    "wrong lengths": (_wrong_lengths, "bytes: must be"),
    "over-long sample": (_over_long_sample, "must be in [1, 16] tokens"),
    "empty batch": (_empty_batch, "BATCH slots: must be distinct"),
    "duplicate slots": (_duplicate_slots, "BATCH slots: must be distinct"),
    "duplicate fresh slots": (_duplicate_fresh, "BATCH fresh slots: must be distinct"),
    "slot out of range": (_foreign_slot, "below 32"),
    "slot that was never sent": (_never_sent_slot, "was never sent"),
    "batch out of order": (_later_step, "BATCH step 1: must be 0"),
    "gradient out of order": (_gradient_of_another_step, "must be GRAD of step 0"),
    "repeated frame": (_repeated_frame, "frame sequence 3: must be 4"),
    "skipped frame": (_skipped_frame, "frame sequence 4: must be 3"),
    "batches without end": (_endless_batches, "last must be true at 1"),
    "an end before the end": (_early_end, "last must be true at 1"),
    "a frame of another kind": (_done_for_gradient, "DONE frame: must be GRAD"),
    "no batches": (_no_batches, "READY with 0 batches"),
    "countless samples": (_countless_samples, "READY with 2 batches of 1099511627776 samples"),
    "bytes that are no frame": (_garbage, "frame magic"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_bad_frame_costs_its_sender_alone(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    tamper, reason = TAMPERED[case]
    if case == "slot out of range":
        reason = "must be distinct, >= 1 of them, below"
    tamper_with(monkeypatch, {VICTIM: tamper})
    run = run_locally(make_config(**QUICK))
    assert_only_the_victim_is_lost(run, reason)
    assert len(run.grid.replies) == 3
    refused = [r for r in run.grid.replies if r.has_error()]
    assert [r.metadata.src_node_id for r in refused] == [1034]


def test_what_the_others_learn_is_untouched_by_a_bad_frame(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN gradient gives the very top that the others make when the sender leaves instead."""

    def leave(outgoing: Outgoing) -> bool:
        if outgoing.at(Kind.GRAD, 1):
            outgoing.link.close("left")
            return True
        return False

    states = []
    for tamper in (_nan_gradient, leave):
        with monkeypatch.context() as patched:
            tamper_with(patched, {VICTIM: tamper})
            states.append(run_locally(make_config(**QUICK)).state)
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name])


def test_an_oversized_frame_costs_its_sender_alone(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def oversized(outgoing: Outgoing) -> bool:
        if outgoing.at(Kind.BATCH):
            outgoing.body = bytes(3 << 20)
        outgoing.send()
        return True

    tamper_with(monkeypatch, {VICTIM: oversized}, frame_mb=16)
    run = run_locally(make_config(session__max_frame_mb=1, **QUICK))
    assert_only_the_victim_is_lost(run, "session closed")
    (refused,) = [r for r in run.grid.replies if r.has_error()]
    assert "larger than max" in refused.error.reason


# ---- owners that go away ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.BATCH, Kind.GRAD, Kind.DONE])
def test_an_owner_that_disappears_in_a_step(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    def vanish(outgoing: Outgoing) -> bool:
        if outgoing.at(kind, 1):
            outgoing.link._channel.close()  # type: ignore[attr-defined]
            return True
        return False

    tamper_with(monkeypatch, {VICTIM: vanish})
    began = time.monotonic()
    run = run_locally(make_config(**QUICK))
    assert_only_the_victim_is_lost(run, "SessionError")
    assert time.monotonic() - began < 20, "a lost stream should be noticed at once"


@pytest.mark.parametrize("kind", [Kind.READY, Kind.BATCH, Kind.GRAD])
def test_an_owner_that_stops_answering(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    silent = False

    def silence(outgoing: Outgoing) -> bool:
        nonlocal silent
        silent = silent or outgoing.at(kind)
        return silent

    tamper_with(monkeypatch, {VICTIM: silence})

    def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
        honest = strategy._member

        def member(link: Any, hello: Any) -> Any:
            made = honest(link, hello)
            if hello.owner == "owner-1":  # the others may be slow on a busy machine
                made._deadline = 1.0
            return made

        strategy._member = member  # type: ignore[method-assign]

    run = run_locally(make_config(**QUICK), prepare=prepare)
    assert_only_the_victim_is_lost(run, "DeadlineError: no frame within 1 s")


def test_an_owner_that_raises_before_it_connects(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch, {1: {2}})
    open_stream = client_work.open_stream

    def unwilling(offer: Any, config: Any, node_config: dict[str, Any]) -> Any:
        if node_config["partition-id"] == VICTIM:
            raise ConfigError("session-ca='x': must be a readable PEM file")
        return open_stream(offer, config, node_config)

    monkeypatch.setattr(client_work, "open_stream", unwilling)
    run = run_locally(make_config(**QUICK))
    # Nobody has heard its name yet: it is called by its node, and its own reason is kept.
    assert_only_the_victim_is_lost(run, "session-ca='x'", name="node 1034")


def test_an_owner_whose_process_is_gone(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch, {1: {2}})

    def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
        grid.dead.add(VICTIM)

    run = run_locally(make_config(**QUICK), prepare=prepare)
    assert_only_the_victim_is_lost(run, "never connected (0.2 s)", name="node 1034")


def test_a_lost_owner_is_back_in_the_next_round(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def once(outgoing: Outgoing) -> None:
        if outgoing.round == 1:
            _nan_gradient(outgoing)

    tamper_with(monkeypatch, {VICTIM: once})
    run = run_locally(make_config(**QUICK | {"train__rounds": 2}))
    assert_only_the_victim_is_lost(run, "must be finite")
    second = run.server["rounds"][1]["train"]
    assert second["finished"] == ["owner-0", "owner-1", "owner-2"]
    assert second["lost"] == {}


@pytest.mark.parametrize("transport", ["stream", "messages"])
def test_all_owners_failing_is_an_end_with_reasons(
    make_config: Any,
    run_locally: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    transport: str,
) -> None:
    def broken(self: Any, digest: str) -> Any:
        raise ModelError("bottom: power cut")

    monkeypatch.setattr(client_work._Work, "prepare", broken)
    config = make_config(session__transport=transport, **QUICK)
    with pytest.raises(RunError, match=r"round 1: no owner took a step: owner-\d: .*power cut"):
        run_locally(config)
    row = json.loads((tmp_path / "server" / "server.json").read_text())["rounds"][0]["train"]
    assert sorted(row["lost"]) == ["owner-0", "owner-1", "owner-2"]
    assert row["finished"] == []


def test_no_owner_connecting_is_an_end_too(make_config: Any, run_locally: Any) -> None:
    def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
        grid.dead.update(range(3))

    with pytest.raises(RunError, match=r"never connected \(0.5 s\)"):
        run_locally(make_config(**QUICK | {"session__wave_wait_s": 0.5}), prepare=prepare)


# ---- waves --------------------------------------------------------------------------------------


def test_a_wave_that_stays_smaller_than_expected(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch, {1: {1, 3}})

    def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
        grid.dead.add(VICTIM)
        strategy._roll.names = {grid_node(grid, i): f"owner-{i}" for i in range(4)}

    config = make_config(data__owners=4, session__wave=2, **QUICK)
    train = run_locally(config, prepare=prepare, slots=2).server["rounds"][0]["train"]
    assert train["waves"] == [["owner-0"], ["owner-2", "owner-3"]]
    assert train["finished"] == ["owner-0", "owner-2", "owner-3"]
    assert train["lost"] == {"owner-1": "never connected (0.2 s)"}
    assert train["steps"] == 4


def test_a_first_wave_that_never_comes_does_not_end_the_round(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next wave is asked only when the first one's message has come back, which can be late."""
    open_stream, ask = client_work.open_stream, Round.ask
    rounds: list[Round] = []

    def asked(self: Round, nodes: Any) -> None:
        rounds.append(self)
        self._wait_s = 0.3 if len(rounds) == 1 else 60.0
        ask(self, nodes)

    def late(offer: Any, config: Any, node_config: dict[str, Any]) -> Any:
        if node_config["partition-id"] > 0:
            return open_stream(offer, config, node_config)
        until = time.monotonic() + 30
        while not rounds[0].report.cohort.lost and time.monotonic() < until:
            time.sleep(0.05)
        raise ConfigError("home: must be writable")

    monkeypatch.setattr(Round, "ask", asked)
    monkeypatch.setattr(client_work, "open_stream", late)
    run = run_locally(make_config(session__wave=1, **QUICK), slots=1)
    train = run.server["rounds"][0]["train"]
    assert train["finished"] == ["owner-1", "owner-2"]
    assert list(train["lost"]) == ["owner-0"]
    assert "home: must be writable" in train["lost"]["owner-0"]


def grid_node(grid: LocalGrid, owner: int) -> int:
    return next(node for node, index in grid.nodes.items() if index == owner)


# ---- tokens and names ---------------------------------------------------------------------------


def test_a_token_is_good_for_one_session_of_one_owner(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch, {1: {2}, 2: {1}})
    seen: dict[str, Any] = {}
    used: dict[str, str] = {}
    there = threading.Event()

    def keep(outgoing: Outgoing) -> None:
        if outgoing.kind is Kind.HELLO and not there.is_set():
            seen.update(outgoing.header)
        elif outgoing.kind is Kind.READY:  # its token is used up: TLS is what keeps it till then
            there.set()

    def other_token(outgoing: Outgoing) -> None:
        if outgoing.kind is Kind.HELLO and there.wait(10):
            outgoing.header["token"] = seen["token"]

    def other_token_and_node(outgoing: Outgoing) -> None:
        if outgoing.kind is Kind.HELLO and there.wait(10):
            outgoing.header.update(seen)

    def nobodys_token(outgoing: Outgoing) -> None:
        if outgoing.kind is Kind.HELLO:
            outgoing.header["token"] = "0" * 32 + ".99999999999." + "0" * 64

    def replayed(outgoing: Outgoing) -> None:
        if outgoing.kind is Kind.HELLO:
            outgoing.header["token"] = used.setdefault("token", outgoing.header["token"])

    thieves = [other_token, other_token_and_node, nobodys_token]
    tamper_with(monkeypatch, {0: keep, 4: replayed} | dict(enumerate(thieves, 1)))
    options = QUICK | {"train__rounds": 2, "train__max_steps": 1, "data__owners": 5}
    run = run_locally(make_config(**options))
    first, second = [row["train"] for row in run.server["rounds"]]
    assert first["finished"] == ["owner-0", "owner-4"]
    assert second["finished"] == ["owner-0"]
    assert len(first["lost"]) == 3
    assert len(second["lost"]) == 4
    for why in [*first["lost"].values(), *second["lost"].values()]:
        assert "TokenError: session token" in why


def test_two_owners_of_one_name(make_config: Any, run_locally: Any) -> None:
    """The second would be taken for the first wherever something is kept by name."""

    def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
        grid.node_configs[VICTIM] = {"owner": "owner-0"}
        strategy._roll.names = {grid_node(grid, 0): "owner-0"}

    run = run_locally(make_config(**QUICK), prepare=prepare)
    assert_only_the_victim_is_lost(run, "another node has it already", name="node 1034")


# ---- replies ------------------------------------------------------------------------------------


def replies_of(
    monkeypatch: pytest.MonkeyPatch, owner: int, change: Callable[[Message], None]
) -> None:
    """Let ``change`` alter what one owner replies to its train message."""
    honest = HANDLERS["train"]

    def handler(message: Message, context: Any) -> Message:
        reply = honest(message, context)
        if context.node_config["partition-id"] == owner and not reply.has_error():
            change(reply)
        return reply

    monkeypatch.setitem(HANDLERS, "train", handler)


def _without_report(reply: Message) -> None:
    del reply.content[REPORT]


def _without_targets(reply: Message) -> None:
    del reply.content[REPORT]["targets"]


def _nan_loss(reply: Message) -> None:
    reply.content[REPORT]["loss"] = float("nan")


def _boast(reply: Message) -> None:
    reply.content[REPORT]["targets"] = 1e12


def _nothing_learned(reply: Message) -> None:
    reply.content[REPORT]["num-examples"] = 0


def _another_name(reply: Message) -> None:
    reply.content["fedsplit.who"]["owner"] = "owner-0"


BAD_REPORTS: dict[str, tuple[Callable[[Message], None], str]] = {
    "no report": (_without_report, "no report"),
    "a number is missing": (_without_targets, "must have 'targets'"),
    "a number is NaN": (_nan_loss, "must be one finite number"),
    "more weight than it trained on": (_boast, "must be 8.0, as in its steps"),
    "no examples": (_nothing_learned, "num-examples=0.0: must be > 0"),
    "another owner's name": (_another_name, "must be 'owner-1'"),
}


@pytest.mark.parametrize("case", BAD_REPORTS)
def test_a_bad_report_is_left_out(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    change, reason = BAD_REPORTS[case]
    replies_of(monkeypatch, VICTIM, change)
    run = run_locally(make_config(**QUICK))
    train = run.server["rounds"][0]["train"]
    assert list(train["lost"]) == ["owner-1"]
    assert reason in train["lost"]["owner-1"]
    assert sorted(train["metrics"]["owners"]) == OTHERS


def _first(reply: Message) -> tuple[ArrayRecord, str, np.ndarray]:
    record = reply.content.array_records[WEIGHTS]
    name = next(iter(record))
    return record, name, record[name].numpy().copy()


def _nan_weight(reply: Message) -> None:
    record, name, value = _first(reply)
    value.flat[0] = np.nan
    record[name] = Array(value)


def _infinite_weight(reply: Message) -> None:
    record, name, value = _first(reply)
    value.flat[0] = np.inf
    record[name] = Array(value)


def _other_shape(reply: Message) -> None:
    record, name, value = _first(reply)
    record[name] = Array(value.reshape(-1))


def _other_numbers(reply: Message) -> None:
    record, name, value = _first(reply)
    record[name] = Array(value.astype(np.float64))


def _missing_weight(reply: Message) -> None:
    record, name, _ = _first(reply)
    del record[name]


def _foreign_weight(reply: Message) -> None:
    record, _, value = _first(reply)
    record["head.weight"] = Array(value)


def _truncated_weight(reply: Message) -> None:
    record, name, _ = _first(reply)
    honest = record[name]
    record[name] = Array(
        dtype=honest.dtype, shape=honest.shape, stype=honest.stype, data=honest.data[:-4]
    )


def _no_weights(reply: Message) -> None:
    del reply.content[WEIGHTS]


BAD_WEIGHTS: dict[str, tuple[Callable[[Message], None], str]] = {
    "NaN": (_nan_weight, "must be finite"),
    "infinite": (_infinite_weight, "must be finite"),
    "another shape": (_other_shape, "must be float32 ("),
    "another dtype": (_other_numbers, "must be float32 ("),
    "missing": (_missing_weight, "missing or foreign names"),
    "foreign": (_foreign_weight, "missing or foreign names"),
    "truncated": (_truncated_weight, "bottom weight"),
    "none at all": (_no_weights, "must be ['arrays']"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_in_one_reply_are_refused_and_the_others_averaged(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    kept: dict[int, dict[str, np.ndarray]] = {}
    honest = HANDLERS["train"]

    def keep(message: Message, context: Any) -> Message:
        reply = honest(message, context)
        arrays = reply.content.array_records[WEIGHTS]
        kept[context.node_config["partition-id"]] = {n: a.numpy() for n, a in arrays.items()}
        return reply

    monkeypatch.setitem(HANDLERS, "train", keep)
    change, reason = BAD_WEIGHTS[case]
    replies_of(monkeypatch, VICTIM, change)
    run = run_locally(make_config(split__bottom="joint", train__bottom_lr=1e-2, **QUICK))
    lost = run.server["rounds"][0]["train"]["lost"]
    assert list(lost) == ["owner-1"]
    assert "update refused" in lost["owner-1"]
    assert reason in lost["owner-1"]
    assert len(run.result.arrays) > 0
    for name, array in run.result.arrays.items():
        mean = (kept[0][name] + kept[2][name]) / 2  # both trained on as many samples
        np.testing.assert_allclose(array.numpy(), mean, atol=1e-7)


# ---- the owners' own data (outside a simulation, each with its own files) -----------------------


@pytest.fixture
def own_files(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, texts: Path
) -> Callable[..., tuple[RunConfig, Callable[[LocalGrid, SplitTuning], None]]]:
    """Return a function: owner-1's rows -> settings and grid of three owners with own files."""
    rows = [json.loads(line) for line in texts.read_text().splitlines()]

    def build(bad: list[dict[str, Any]] | None, **node: Any) -> Any:
        config = make_config(**QUICK)
        monkeypatch.delenv("FEDSPLIT_SIMULATION")
        parts = [rows[:30], rows[30:60] if bad is None else bad, rows[60:90]]

        def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
            for owner, part in enumerate(parts):
                path = tmp_path / f"own-{owner}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in part))
                grid.node_configs[owner] = {
                    "data-path": str(path),
                    "state-dir": str(tmp_path / f"home-{owner}"),
                }
            grid.node_configs[VICTIM] |= node

        return config, prepare

    return build


def _texts(n: int) -> list[dict[str, Any]]:
    return [{"text": f"w{i} w{i + 1} w{i + 2}", "label": i % 3} for i in range(n)]


BAD_DATA: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "a label outside the range": ([*_texts(30), {"text": "w1", "label": 3}], {}, "label=3"),
    "a missing column": ([{"words": "w1 w2", "label": 0}] * 30, {}, "text"),
    "another column's name": (_texts(30), {"label-column": "class"}, "class"),
    "no rows": ([], {}, "own-1.jsonl"),
    "one row": (_texts(1), {}, "1 samples: must be >= 2"),
    "no file": (_texts(30), {"data-path": "/nowhere/texts.jsonl"}, "/nowhere/texts.jsonl"),
    "no data named": (_texts(30), {"data-path": ""}, "data-path: must name this owner's own"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_at_one_owner(
    own_files: Any, run_locally: Any, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    rows, node, reason = BAD_DATA[case]
    config, prepare = own_files(rows, **node)
    # The first run in a process takes fedsplit's loggers away from the root, where caplog listens.
    logger = logging.getLogger("fedsplit")
    logger.addHandler(caplog.handler)
    try:
        run = run_locally(config, prepare=prepare)
    finally:
        logger.removeHandler(caplog.handler)
    # What is wrong with the data stands in the owner's log; the server learns that it was the data.
    told = reason if "data-path: must" in reason else "DataError: this owner's data cannot be used"
    assert_only_the_victim_is_lost(run, told)
    assert any(reason in record.getMessage() for record in caplog.records)


def test_good_files_of_their_own(own_files: Any, run_locally: Any) -> None:
    config, prepare = own_files(None)
    train = run_locally(config, prepare=prepare).server["rounds"][0]["train"]
    assert train["lost"] == {}
    assert len(train["finished"]) == 3


def test_a_secret_that_others_can_read(
    own_files: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hurry(monkeypatch, {1: {2}})
    (tmp_path / "home-1").mkdir()
    secret = tmp_path / "home-1" / "noise.secret"
    secret.write_bytes(bytes(32))
    secret.chmod(0o640)
    config, prepare = own_files(None)
    run = run_locally(config, prepare=prepare)
    assert_only_the_victim_is_lost(run, "must be 0600", name="node 1034")


# ---- settings -----------------------------------------------------------------------------------


def test_an_empty_partition_ends_the_run_with_its_reason(
    make_config: Any, run_locally: Any
) -> None:
    config = make_config(data__partition="column", data__column="writer", **QUICK)
    with pytest.raises(RunError, match="no owner took a step") as caught:
        run_locally(make_config(**QUICK | {"data__limit": 5}))
    assert "every owner must have 2" in str(caught.value)
    assert run_locally(config).server["rounds"][0]["train"]["lost"] == {}


def test_wrong_settings_end_the_run_before_it_begins(
    make_config: Any, run_locally: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"k=3: must be in 0..2"):
        run_locally(make_config(split__k=3))
    for name, value in (("eta", -1.0), ("eta", 0.0), ("noise_ratio", -2.0)):
        with pytest.raises(ConfigError, match=f"privacy.*{value}"):
            make_config(privacy__mechanism="dchi", **{f"privacy__{name}": value})
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text(json.dumps({"model_type": "perceptron-1958"}))
    with pytest.raises((ModelError, UnsupportedModelError), match="perceptron-1958"):
        run_locally(make_config(model__name=str(unknown)))
    with pytest.raises(ConfigError, match="mechanism='rot13': must be one of"):
        run_locally(make_config(privacy__mechanism="rot13"))


# ---- the top ------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_leaves_the_top_as_it_was() -> None:
    from fedsplit.config import TrainConfig

    parameter = torch.nn.Parameter(torch.ones(3))
    optimisation = Optimisation([parameter], [], TrainConfig(clip=0.0))
    for bad in (float("nan"), float("inf")):
        parameter.grad = torch.tensor([1.0, bad, 1.0])
        with pytest.raises(ModelError, match="must be finite; the step was not taken"):
            optimisation.step(0.5)
        assert torch.equal(parameter.detach(), torch.ones(3))
        assert parameter.grad is None


def plant(strategy: SplitTuning, number: int, value: float) -> None:
    """Put noise into the top at the end of round ``number``, before the gate looks."""
    honest = strategy._check_lineage

    def check(round_: int) -> dict[str, Any]:
        if round_ == number:
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in strategy.parts.trainable.parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(noise * value)
        return honest(round_)

    strategy._check_lineage = check  # type: ignore[method-assign]


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_the_gate_restores_the_last_good_top(
    make_config: Any, run_locally: Any, tmp_path: Path, value: float
) -> None:
    # A rate that depends on the number of rounds would make the first rounds differ.
    options = QUICK | {"lineage__gate": "reject", "train__schedule": "constant"}
    options |= {"train__warmup": 0.0}
    rounds = options | {"train__rounds": 2}

    def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
        plant(strategy, 2, value)

    one = run_locally(make_config(**options))
    two = run_locally(make_config(**rounds), prepare=prepare)
    first, second = [row["lineage"] for row in two.server["rounds"]]
    assert first["verdict"] == "in_lineage"
    assert "rejected" not in first
    assert second["verdict"] != "in_lineage"
    assert second["rejected"] is True
    for name, tensor in one.state.items():
        assert torch.equal(two.state[name], tensor)


def test_a_rejected_joint_round_takes_the_bottom_back_too(
    make_config: Any, run_locally: Any
) -> None:
    options = QUICK | {"lineage__gate": "reject", "train__warmup": 0.0, "split__bottom": "joint"}
    options |= {"train__schedule": "constant", "train__bottom_lr": 1e-2}

    def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
        plant(strategy, 2, 1.0)

    one = run_locally(make_config(**options))
    two = run_locally(make_config(**options | {"train__rounds": 2}), prepare=prepare)
    for name, array in one.result.arrays.items():
        assert np.array_equal(array.numpy(), two.result.arrays[name].numpy())


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_the_gate_stops_the_run_and_leaves_the_evidence(
    make_config: Any, run_locally: Any, tmp_path: Path, value: float
) -> None:
    def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
        plant(strategy, 1, value)

    with pytest.raises(LineageError, match="round 1: lineage"):
        run_locally(make_config(**QUICK | {"lineage__gate": "stop"}), prepare=prepare)
    row = json.loads((tmp_path / "server" / "server.json").read_text())["rounds"][0]
    assert row["lineage"]["verdict"] != "in_lineage"


# ---- the disk -----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "open", "replace"])
def test_a_full_disk_names_the_file_and_keeps_what_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str
) -> None:
    recorder = Recorder(tmp_path)
    recorder.write(status="running")
    before = (tmp_path / "server.json").read_text()

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {
        "fsync": "strategies.recorder.os.fsync",
        "open": "builtins.open",
        "replace": "pathlib.Path.replace",
    }[call]
    with monkeypatch.context() as patched:
        patched.setattr(target, full)
        with pytest.raises(RunError, match=r"cannot write .*server\.json.*No space left"):
            recorder.round({"round": 1})
    assert (tmp_path / "server.json").read_text() == before
    recorder.write()  # there is room again
    assert json.loads((tmp_path / "server.json").read_text())["rounds"] == [{"round": 1}]


def test_a_disk_that_fills_during_the_run(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from strategies import recorder

    honest, rounds_written = recorder.Recorder.round, 0

    def fills(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def round_(self: Recorder, row: dict[str, Any]) -> None:
        nonlocal rounds_written
        rounds_written += 1
        if rounds_written <= 1:
            return honest(self, row)
        with monkeypatch.context() as patched:  # owners' ledgers are on disks of their own
            patched.setattr(recorder.os, "fsync", fills)
            return honest(self, row)

    monkeypatch.setattr(recorder.Recorder, "round", round_)
    with pytest.raises(RunError, match=r"cannot write .*server\.json"):
        run_locally(make_config(**QUICK | {"train__rounds": 3}))
    rounds = json.loads((tmp_path / "server" / "server.json").read_text())["rounds"]
    assert [row["round"] for row in rounds] == [1]


def test_a_disk_too_full_for_the_transcript(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from strategies.store import RepresentationStore

    store = RepresentationStore()
    store.put("owner-0", "train", 0, torch.ones(2, 3), torch.float32)

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("strategies.store.save_file", full)
    with pytest.raises(RunError, match="cannot write the transcript"):
        Recorder(tmp_path).transcript(store)
    assert not (tmp_path / "transcript.safetensors").exists()


def test_an_owner_refuses_logits_that_are_not_finite(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that sends NaN learns nothing from the owner, and the run ends with a reason."""
    answered: list[int] = []
    honest = LabelSide.answer

    def answer(self: LabelSide, *args: Any) -> Any:
        answered.append(1)
        return honest(self, *args)

    def poison(body: Any, codec: str) -> bytes:
        data = encode(body, codec)
        return struct.pack("<f", float("nan")) + data[4:]

    from strategies import member

    encode = member.encode_rows
    monkeypatch.setattr(member, "encode_rows", poison)
    monkeypatch.setattr(LabelSide, "answer", answer)
    with pytest.raises(RunError, match="must be finite"):
        run_locally(make_config(**QUICK))
    assert not answered
