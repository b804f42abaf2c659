"""Log lines: whose they are is known without being told, and a log never ends what it logs."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.errors import ConfigError
from fedsplit.observe import JsonLines, bound, carried, context, writing
from fedsplit.owners.own_log import own_log

log = logging.getLogger("fedsplit.tests.json_lines")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_a_line_says_run_round_and_owner(tmp_path: Path) -> None:
    handler = JsonLines(tmp_path / "log.jsonl", where=lambda: {"run": "7", "round": 1})
    with writing(handler, ["fedsplit"]):
        log.info("owner %s left out: %s", "a", "why")
        with bound(owner="a", round=2):
            log.warning("again")
        handler.note("session", bytes=3)
    log.warning("after the block")

    first, second, third = rows(tmp_path / "log.jsonl")
    assert first["event"] == "owner %s left out: %s"
    assert first["message"] == "owner a left out: why"
    assert (first["run"], first["round"], "owner" in first) == ("7", 1, False)
    assert (second["level"], second["owner"], second["round"]) == ("WARNING", "a", 2)
    assert (third["event"], third["data"]) == ("session", {"bytes": 3})


def test_the_context_goes_with_a_carried_thread_and_with_no_other() -> None:
    seen: dict[str, Any] = {}

    def look(name: str) -> None:
        seen[name] = dict(context())

    with bound(owner="a"):
        threads = [
            threading.Thread(target=carried(look), args=("carried",)),
            threading.Thread(target=look, args=("plain",)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert seen == {"carried": {"owner": "a"}, "plain": {}}
    assert dict(context()) == {}


def test_the_context_ends_with_its_block_also_when_it_raises() -> None:
    seen = {}

    def fail() -> None:
        with bound(owner="a"), bound(owner="b", node="1"):
            seen.update(context())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == {"owner": "b", "node": "1"}
    assert dict(context()) == {}


@given(st.text(max_size=200), st.text(max_size=50))
@settings(max_examples=100, deadline=None)
def test_whatever_is_said_is_one_line_of_json(tmp_path_factory: Any, text: str, name: str) -> None:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    with writing(JsonLines(path), ["fedsplit"]), bound(owner=name):
        log.info("%s", text)
        log.info("next")

    first, second = rows(path)
    assert (first["message"], first["owner"], second["message"]) == (text, name, "next")
    assert path.read_bytes().isascii()


def test_a_long_log_keeps_two_files(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    handler = JsonLines(path, most_bytes=2000)
    with writing(handler, ["fedsplit"]):
        for number in range(100):
            log.info("line %d", number)

    kept = [*rows(path.with_name("log.jsonl.1")), *rows(path)] if path.exists() else []
    assert path.with_name("log.jsonl.1").stat().st_size < 2500
    assert not kept or kept[-1]["message"] == "line 99"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "log.jsonl") == ["log.jsonl.1"]


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    handler = JsonLines(tmp_path)  # a folder: no file can be made there
    for text, value in (("lost", ()), ("%d", ("not a number",))):
        handler.handle(logging.LogRecord("fedsplit", logging.INFO, "", 0, text, value, None))

    assert handler.dropped == 2


def test_an_owner_writes_only_what_it_asked_for(tmp_path: Path) -> None:
    with own_log(tmp_path, {}, owner="a", run="7"):
        log.warning("derived from data")
    assert list(tmp_path.iterdir()) == []

    with own_log(tmp_path, {"log-json": True}, owner="a", run="7", round=3):
        log.warning("mine")
        with bound(owner="b"):
            log.warning("of another owner in the same process")
    (row,) = rows(tmp_path / "log.jsonl")
    assert (row["message"], row["owner"], row["run"], row["round"]) == ("mine", "a", "7", 3)
    assert row["side"] == "owner"
    assert (tmp_path / "log.jsonl").stat().st_mode & 0o777 == 0o600


def test_an_owner_says_yes_or_no(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="log-json='yes': must be true or false"):  # noqa: SIM117
        with own_log(tmp_path, {"log-json": "yes"}, owner="a"):
            pass
