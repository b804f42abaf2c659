"""Owners' reports: what one schema writes it reads back, and nothing else passes."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedsplit.errors import ConfigError, WireError
from fedsplit.wire.messages import REPORT, WHO
from fedsplit.wire.replies import REPLIES, Bounds, ReplySchema, reply_schema

SCHEMA = ReplySchema(
    "s", "train", {"loss": Bounds(), "n": Bounds(0.0, above=True)}, {"p": Bounds(0, 1)}
)
NAMED = ConfigRecord({"owner": "a", "schema": SCHEMA.name})


def reply(**metrics: object) -> RecordDict:
    return RecordDict({REPORT: MetricRecord({"loss": 0.5, "n": 1, **metrics}), WHO: NAMED})


@pytest.mark.parametrize("name", REPLIES)
def test_what_an_owner_writes_the_server_reads(name: str):
    schema = REPLIES[name]
    metrics = dict.fromkeys((*schema.required, *schema.optional), 1)

    assert schema.read(schema.write(metrics, "owner-1")) == (metrics, "owner-1")


def test_the_report_of_another_strategy_is_refused():
    split, offsite = reply_schema("split-tuning", "train"), reply_schema("offsite-tuning", "train")
    content = split.write(dict.fromkeys(split.required, 1.0), "a")

    with pytest.raises(WireError, match=r"schema 'split-tuning/train/1': must be 'offsite-tuning"):
        offsite.read(content)
    with pytest.raises(ConfigError, match="reply='serving/train': must be one of"):
        reply_schema("serving", "train")


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), 1e30, [1.0], [1, 2], []]
)
def test_reports_hold_finite_single_numbers(value: object):
    with pytest.raises(WireError, match="'loss': must be one finite number"):
        SCHEMA.read(reply(loss=value))


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ({"n": 0}, r"n=0.0: must be > 0"),
        ({"p": 1.5}, r"p=1.5: must be in \[0, 1\]"),
        ({"label": 3.0}, r"'label' is no number of s/train/1"),
    ],
)
def test_numbers_are_bounded_and_known(metrics: dict[str, float], told: str):
    with pytest.raises(WireError, match=told):
        SCHEMA.read(reply(**metrics))
    with pytest.raises(WireError):
        SCHEMA.write({"loss": 0.5, "n": 1, **metrics}, "a")


def test_a_missing_number_is_named():
    content = RecordDict({REPORT: MetricRecord({"n": 1}), WHO: NAMED})

    with pytest.raises(WireError, match="must have 'loss'"):
        SCHEMA.read(content)


@pytest.mark.parametrize(
    "who",
    [
        {},
        {"owner": 5, "schema": SCHEMA.name},
        {"owner": "a"},
        {"owner": "a", "schema": 3},
        {"owner": "", "schema": SCHEMA.name},
        {"owner": "x" * 201, "schema": SCHEMA.name},
        {"owner": "a\nb", "schema": SCHEMA.name},
    ],
)
def test_reports_without_a_name_or_schema_are_refused(who: dict[str, object]):
    metrics = MetricRecord({"loss": 1.0, "n": 1})

    with pytest.raises(WireError):
        SCHEMA.read(RecordDict({REPORT: metrics, WHO: ConfigRecord(who)}))
    with pytest.raises(WireError, match="no report"):
        SCHEMA.read(RecordDict({REPORT: metrics}))
    with pytest.raises(WireError, match="no report"):
        SCHEMA.read(RecordDict({REPORT: ConfigRecord({"loss": 1.0}), WHO: NAMED}))
