"""What an owner's reply must hold before anything in it is believed or averaged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, Metadata, RecordDict

from fedsplit.errors import ModelError, SessionError, WireError
from fedsplit.observe import printable
from fedsplit.sums import add_up, is_sum
from fedsplit.wire.messages import WEIGHTS, read_array
from fedsplit.wire.replies import ReplySchema

from .contributions import capped
from .report import RoundReport, natural

log = logging.getLogger(__name__)

Accepted = tuple[str, dict[str, float]]
NO_REPLY = "no reply within session.round-s, or session.idle-s after its session"


def read_reply(
    schema: ReplySchema, content: RecordDict, known_as: str | None, report: RoundReport
) -> tuple[dict[str, float], str]:
    """Return (metrics, owner's name) of a reply.

    Args:
        schema: of the replies that the round asked for.
        content: the reply's.
        known_as: the name that its node opened its session under, if it opened one.
        report: what the server itself saw of the round's sessions.

    Raises:
        WireError: malformed, a number missing, unknown or out of its range, another owner's name,
            another weight in the average than the session's own steps had, or more examples or
            targets than its session was about.
    """
    metrics, name = schema.read(content)
    if known_as is not None and name != known_as:
        raise SessionError(f"reply under the name {name!r}: must be {known_as!r}")
    seen = report.targets.get(name)
    if seen is not None and name in report.finished and metrics["targets"] != seen:
        raise SessionError(f"reply's targets={metrics['targets']}: must be {seen}, as in its steps")
    for key, most in zip(("num-examples", "targets"), report.most.get(name, ()), strict=False):
        if metrics[key] > most:
            raise SessionError(f"reply's {key}={metrics[key]:g}: must be <= {most}, its session's")
    return metrics, name


def node_of(reply: Message, asked: Iterable[Metadata]) -> int:
    """Return the node that a reply is about.

    An error that the SuperLink answers for a node (it went offline, its reply expired) bears the
    SuperLink's own id.  Whom it is about tells the message that it answers.

    Args:
        reply: as it came.
        asked: metadata of the messages that were sent; Flower's grid gives them their ids.
    """
    if reply.has_error():
        for sent in asked:
            if sent.message_id and sent.message_id == reply.metadata.reply_to_message_id:
                return sent.dst_node_id
    return reply.metadata.src_node_id


def reason_of(reply: Message) -> str:
    """Return what an error reply says, for the record."""
    return printable(f"error {reply.error.code}: {reply.error.reason}", most=500)


def unanswered(asked: Iterable[Metadata], replies: Iterable[Message]) -> list[int]:
    """Return the nodes that were sent a message and have answered none."""
    answered = {reply.metadata.reply_to_message_id for reply in replies}
    return [sent.dst_node_id for sent in asked if sent.message_id not in answered]


def collect(
    replies: Iterable[Message],
    asked: Sequence[Metadata],
    names: Mapping[int, str],
    report: RoundReport,
    accept: Callable[[int, Message], Accepted | None],
) -> tuple[list[Message], dict[str, dict[str, float]]]:
    """Return (acceptable replies in the order of their owners' names, their metrics by name).

    Args:
        replies: of one round.
        asked: what they answer.
        names: of the nodes' owners; ``accept`` may add to them.
        report: of the round; told of whoever replied with an error, was refused, or said nothing.
        accept: (node, reply) -> (owner's name, metrics), None for one that does not count; raises
            WireError or ModelError for one that is wrong.
    """
    replies = list(replies)
    good: list[Message] = []
    rows: dict[str, dict[str, float]] = {}
    for reply in replies:
        node = node_of(reply, asked)
        if reply.has_error():
            log.warning("owner at node %d: %s", node, reason_of(reply))
            report.lose(node, names.get(node), reason_of(reply))
            continue
        try:
            accepted = accept(node, reply)
        except (WireError, ModelError) as error:
            log.warning("owner at node %d left out: %s", node, error)
            report.lose(node, names.get(node), f"{type(error).__name__}: {error}")
            continue
        if accepted is not None:
            rows[accepted[0]] = accepted[1]
            good.append(reply)
    for node in unanswered(asked, replies):
        report.lose_silent(node, names.get(node), NO_REPLY)
    report.use_names(names)
    good.sort(key=lambda m: natural(names[m.metadata.src_node_id]))
    return good, rows


def check_weights(content: RecordDict, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check one owner's joint bottom.

    Args:
        content: the reply's.
        expected: name -> shape of every tensor of the bottom.

    Raises:
        ModelError: another record, a missing, foreign, misshapen or non-finite tensor.
    """
    records = content.array_records
    if list(records) != [WEIGHTS]:
        raise ModelError(f"array records {list(records)[:4]}: must be [{WEIGHTS!r}]")
    record: ArrayRecord = records[WEIGHTS]
    if record.keys() != expected.keys():
        odd = sorted(record.keys() ^ expected.keys())[:4]
        raise ModelError(f"bottom weights: missing or foreign names {odd}")
    for name, array in record.items():
        try:
            values = read_array(array, "float32", expected[name])
        except WireError as error:
            raise ModelError(f"bottom weight {name}: {error}") from None
        if not np.isfinite(values).all():
            raise ModelError(f"bottom weight {name}: must be finite")


# Numbers that are averaged over owners, and what weights each.
_WEIGHTS = {"loss": "targets", "accuracy": "targets", "share-touched": "num-examples"}


def average(
    rows: dict[str, dict[str, float]],
    cap: float = 0.0,
    scores: Callable[[Mapping[str, float]], dict[str, Any]] = lambda sums: {},
    headline: Callable[[Mapping[str, float]], float | None] = lambda row: None,
) -> dict[str, Any]:
    """Return weighted means of what the owners report, sums of counts, and the owners' own rows.

    An owner whose policy keeps an average back has no part in that mean.  Additive numbers are
    added up; what they score is that of all these owners' texts together.  ``covered`` says how
    many owners and texts each mean is of, and the ``scores`` of additive numbers.

    Args:
        rows: the owners' numbers.
        cap: an owner weighs at most this many times the median; 0 = as it says.
        scores: what the run's task makes of the additive numbers.
        headline: the task's main score of one owner's numbers, which is recorded beside them as
            ``headline``; None: nothing is.
    """
    if not rows:
        return {"num-examples": 0, "owners": {}}
    found: dict[str, Any] = {"num-examples": int(sum(r["num-examples"] for r in rows.values()))}
    covered: dict[str, dict[str, int]] = {}
    for key, weight in _WEIGHTS.items():
        told = {name: row[key] for name, row in rows.items() if key in row}
        if told:
            covered[key] = _extent(rows, told)
            weights = capped({name: rows[name][weight] for name in told}, cap)
            whole = sum(weights.values())
            found[key] = sum(told[name] * weights[name] for name in told) / whole
    own = {name: value for name, row in rows.items() if (value := headline(row)) is not None}
    sums = add_up(rows.values())
    if sums:
        counting = [name for name, row in rows.items() if any(map(is_sum, row))]
        covered["scores"] = _extent(rows, counting)
        if len(counting) < len(rows):
            log.info(
                "scores by counts are of %(owners)d of %(all)d owners and %(texts)d of %(whole)d "
                "texts: the others keep their counts back",
                covered["scores"] | {"all": len(rows), "whole": found["num-examples"]},
            )
        found |= scores(sums)
        rows = {n: {k: v for k, v in row.items() if not is_sum(k)} for n, row in rows.items()}
    rows = {n: {**row, "headline": own[n]} if n in own else row for n, row in rows.items()}
    found["covered"] = covered
    found["owners"] = dict(sorted(rows.items(), key=lambda item: natural(item[0])))
    return found


def _extent(rows: Mapping[str, Mapping[str, float]], names: Iterable[str]) -> dict[str, int]:
    """Return how many owners some are, and how many texts they have."""
    found = [rows[name]["num-examples"] for name in names]
    return {"owners": len(found), "texts": int(sum(found))}
