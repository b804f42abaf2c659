"""Reports and weights in replies that must not be believed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord

from fedsplit.wire.messages import REPORT, WEIGHTS
from tests.strategies.failing import OTHERS, QUICK, VICTIM, warm
from tests.strategies.local_grid import HANDLERS, LocalGrid

__all__ = ["warm"]  # a fixture that runs by itself


def replies_of(
    monkeypatch: pytest.MonkeyPatch,
    owner: int,
    change: Callable[[Message], None],
    mode: str = "train",
) -> None:
    """Let ``change`` alter what one owner replies to its messages of one mode."""
    honest = HANDLERS[mode]

    def handler(message: Message, context: Any) -> Message:
        reply = honest(message, context)
        if context.node_config["partition-id"] == owner and not reply.has_error():
            change(reply)
        return reply

    monkeypatch.setitem(HANDLERS, mode, handler)


def _without_report(reply: Message) -> None:
    del reply.content[REPORT]


def _without_targets(reply: Message) -> None:
    del reply.content[REPORT]["targets"]


def _made_up_number(reply: Message) -> None:
    reply.content[REPORT]["labels"] = 3.0


def _of_an_older_version(reply: Message) -> None:
    del reply.content["fedsplit.who"]["schema"]


def _nan_loss(reply: Message) -> None:
    reply.content[REPORT]["loss"] = float("nan")


def _boast(reply: Message) -> None:
    reply.content[REPORT]["targets"] = 1e12


def _nothing_learned(reply: Message) -> None:
    reply.content[REPORT]["num-examples"] = 0


def _many_examples(reply: Message) -> None:
    reply.content[REPORT]["num-examples"] = 1e12


def _two_reports(reply: Message) -> None:
    reply.content["first"] = MetricRecord({"targets": 1e12})


def _another_name(reply: Message) -> None:
    reply.content["fedsplit.who"]["owner"] = "owner-0"


BAD_REPORTS: dict[str, tuple[Callable[[Message], None], str]] = {
    "no report": (_without_report, "no report"),
    "a number is missing": (_without_targets, "must have 'targets'"),
    "a number nobody asked for": (_made_up_number, "'labels' is no number of split-tuning/train"),
    "an older owner's": (_of_an_older_version, "the owner needs the server's version of fedsplit"),
    "a number is NaN": (_nan_loss, "must be one finite number"),
    "more weight than it trained on": (_boast, "must be 8.0, as in its steps"),
    "no examples": (_nothing_learned, "num-examples=0.0: must be >= 1"),
    "more examples than its session had": (_many_examples, "num-examples=1e+12: must be <= "),
    "a second report": (_two_reports, "metric record 'first': must be 'fedsplit.report' alone"),
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


def test_an_evaluation_is_of_what_was_answered(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def boast(reply: Message) -> None:
        report = reply.content[REPORT]
        missing = 1e6 - report["targets"]  # in one cell of the table, so that it adds up
        report["targets"] = 1e6
        report["confusion-0-0"] = report.get("confusion-0-0", 0.0) + missing

    replies_of(monkeypatch, VICTIM, boast, "evaluate")
    found = run_locally(make_config(**QUICK | {"output__evaluate_every": 1})).server["rounds"][0]
    assert list(found["evaluate"]["lost"]) == ["owner-1"]
    assert "targets=1e+06: must be <= " in found["evaluate"]["lost"]["owner-1"]
    assert sorted(found["evaluate"]["metrics"]["owners"]) == OTHERS


def test_what_the_superlink_answers_for_an_owner_is_that_owners_loss(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = LocalGrid._work

    def expired(self: LocalGrid, message: Message, replies: list[Message]) -> None:
        if (self.nodes[message.metadata.dst_node_id], message.metadata.message_type) != (
            1,
            "train",
        ):
            work(self, message, replies)
            return
        work(self, message, [])  # the owner did its part, and its reply was lost on the way
        error = Message(Error(code=4, reason="Reply Message Unavailable"), reply_to=message)
        error.metadata.__dict__["_src_node_id"] = 1  # the SuperLink's own id
        replies.append(error)

    monkeypatch.setattr(LocalGrid, "_work", expired)
    train = run_locally(make_config(**QUICK)).server["rounds"][0]["train"]
    assert list(train["lost"]) == ["owner-1"]
    assert "Reply Message Unavailable" in train["lost"]["owner-1"]
    assert train["asked"] == 3
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


def _bytes(data: bytes) -> Callable[[Message], None]:
    """Return what declares the weight as it should be, with other bytes."""

    def change(reply: Message) -> None:
        record, name, _ = _first(reply)
        told = record[name]
        record[name] = Array(dtype=told.dtype, shape=told.shape, stype=told.stype, data=data)

    return change


def _complex_weight(reply: Message) -> None:
    _, _, value = _first(reply)
    _bytes(Array(value * (1 + 1j)).data)(reply)


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
    "no bytes": (_bytes(b""), "EOFError"),
    "a broken archive": (_bytes(b"PK\x03\x04"), "BadZipFile"),
    "other numbers than it says": (_complex_weight, "holds complex"),
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
