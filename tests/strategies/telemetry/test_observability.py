"""What a server shows of its run: right, readable by others' tools, and never in the way."""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError, RunError
from fedsplit.owners.own_log import own_log
from fedsplit.wire.frames import Kind
from fedsplit.wire.link import Link, loopback
from strategies.telemetry.metrics import MOST_CALLERS, MetricsPort, render
from strategies.telemetry.observers import Observers
from strategies.telemetry.status import Live, quantile
from strategies.telemetry.tensorboard import EventFile
from tests.disks import small_files

BYE = {"reason": "done"}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def exchange(left: Link, right: Link) -> int:
    """Send one frame each way and return the bytes that ``left`` received."""
    left.send(Kind.BYE, BYE)
    right.recv(20.0)
    right.send(Kind.BYE, BYE)
    left.recv(20.0)
    return left.traffic.bytes_in


# ---- a whole run --------------------------------------------------------------------------------


def test_a_run_tells_what_its_results_say(make_config: Any, run_locally: Any) -> None:
    config = make_config(output__log_json=True, output__tensorboard=True)
    run = run_locally(config)

    page = json.loads((run.folder / "progress.json").read_text())
    rounds = run.server["rounds"]
    assert page["steps_done"] == sum(r["train"]["steps"] for r in rounds)
    assert page["bytes_up"] == sum(r[m]["bytes_up"] for r in rounds for m in ("train", "evaluate"))
    assert page["states"]["finished"] == 3
    assert page["train"]["loss"] == rounds[-1]["train"]["metrics"]["loss"]
    assert page["lineage"]["verdict"] == rounds[-1]["lineage"]["verdict"]
    assert page["tokens"] == sum(r[m]["row_tokens"] for r in rounds for m in ("train", "evaluate"))

    log = lines(run.folder / "log.jsonl")
    assert all(row["run"] == "7" for row in log)
    assert not [row for row in log if row["logger"].startswith(("fedsplit.owners", "fedsplit.cli"))]
    sessions = [(r["round"], r["mode"], r["owner"]) for r in log if r["event"] == "session"]
    names = ("owner-0", "owner-1", "owner-2")
    assert sorted(sessions) == sorted(
        (n, mode, owner) for n in (1, 2) for mode in ("train", "evaluate") for owner in names
    )

    (events,) = (run.folder / "tensorboard").iterdir()
    drawn = dict(read_events(events))
    assert drawn["train/loss", 2] == pytest.approx(rounds[1]["train"]["metrics"]["loss"], rel=1e-6)
    assert drawn["lineage/score", 1] == pytest.approx(rounds[0]["lineage"]["score"], rel=1e-6)


def test_nobody_is_told_anything_by_default(make_config: Any, run_locally: Any) -> None:
    run = run_locally(make_config())
    assert not {"log.jsonl", "tensorboard"} & {p.name for p in run.folder.iterdir()}


def test_what_an_owner_says_is_not_in_the_servers_log(tmp_path: Path) -> None:
    flat = {"output.dir": str(tmp_path / "server"), "output.log-json": True}
    observers = Observers(RunConfig.from_flat(flat), 1)
    (tmp_path / "home").mkdir()
    with own_log(tmp_path / "home", {}, owner="a"):
        logging.getLogger("fedsplit.privacy.contributing_tokens").warning(
            "words that carry the label: ..."
        )
    logging.getLogger("fedsplit.privacy.contributing_tokens").warning("at the server")
    observers.close()
    said = [row["message"] for row in lines(tmp_path / "server" / "log.jsonl")]
    assert said == ["run", "at the server"]


def test_a_log_needs_a_folder() -> None:
    with pytest.raises(ConfigError, match=r"output\.dir='': must name a folder"):
        Observers(RunConfig.from_flat({"output.log-json": True}), 1)


# ---- the live page ------------------------------------------------------------------------------


def test_bytes_of_open_and_closed_sessions_add_up() -> None:
    live = Live(RunConfig(), 1)
    live.round_started(1, "train", 2)
    total = 0
    for number in range(3):
        left, right = loopback(1 << 16)
        live.session_opened("a", 5, left)
        total += exchange(left, right)
        assert live.page()["bytes_up"] == total
        assert live.page()["states"]["connected"] == 1
        left.close()
        (owner,) = live.page()["owners"]
        assert (owner["bytes_up"], owner["sessions"]) == (total, number + 1)
    assert live.page()["states"]["closed"] == 1


def test_an_owner_left_out_is_shown_with_its_reason_until_it_is_back() -> None:
    live = Live(RunConfig(), 1)
    live.round_started(1, "train", 1)
    live.round_recorded(
        {"round": 1, "train": {"lost": {"a": "DeadlineError: slow"}, "metrics": {}}}
    )
    assert live.page()["owners"][0]["reason"] == "DeadlineError: slow"
    assert live.page()["lost"] == 1
    live.round_recorded({"round": 2, "train": {"benched": {"a": "failed twice"}, "metrics": {}}})
    assert live.page()["states"]["benched"] == 1
    live.session_opened("a", 5, loopback(1 << 16)[0])
    assert live.page()["owners"][0]["state"] == "connected"
    assert "reason" not in live.page()["owners"][0]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50), st.floats(0, 1))
def test_a_quantile_is_a_value_that_so_many_do_not_exceed(
    values: list[float], share: float
) -> None:
    found = quantile(values, share)
    assert found in values
    assert sum(v <= found for v in values) >= share * len(values) - 1e-9


# ---- OpenMetrics --------------------------------------------------------------------------------


def a_page() -> dict[str, Any]:
    live = Live(RunConfig(), 2**64 - 1)
    live.round_started(1, "train", 2)
    for step in range(1, 6):
        live.step_done({"round": 1, "rounds": 3, "mode": "train", "step": step, "steps": 5})
    live.session_opened('an "owner"\n', 5, loopback(1 << 16)[0])
    train = {"finished": ["a"], "metrics": {"loss": 0.5}, "samples": 4, "row_tokens": 9}
    lineage = {"verdict": "not_shown", "score": 0.5}
    live.round_recorded({"round": 1, "train": train, "lineage": lineage})
    live.results_changed({"serving": {"texts": 3, "sessions": 1, "owners": ["a"]}})
    return live.page()


def families(text: str) -> dict[str, Any]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_others_can_read_the_metrics() -> None:
    found = families(render(a_page()).decode())
    samples = {(s.name, *s.labels.values()): s.value for f in found.values() for s in f.samples}
    assert samples["fedsplit_steps_total",] == 5
    assert samples["fedsplit_step_seconds_count",] == 4  # from one step's end to the next one's
    assert samples["fedsplit_loss", "train"] == 0.5
    assert samples["fedsplit_owners", "finished"] == 1
    assert samples["fedsplit_owners", "connected"] == 1
    assert samples["fedsplit_lineage_verdict", "not_shown"] == 1
    assert samples["fedsplit_lineage_verdict", "in_lineage"] == 0
    assert samples["fedsplit_served_texts_total",] == 3


def test_metrics_are_well_formed_and_name_no_owner() -> None:
    text = render(a_page()).decode()
    body = text.splitlines()
    assert body[-1] == "# EOF"
    assert 'owner"' not in text.replace("fedsplit_owners", "")
    assert 'run="18446744073709551615"' in text
    names = [line.split()[2] for line in body if line.startswith("# TYPE")]
    assert len(names) == len(set(names))


@given(st.fixed_dictionaries({}, optional={"round": st.floats(), "rounds": st.floats()}))
@settings(max_examples=30, deadline=None)
def test_a_number_that_is_none_is_left_out(page: dict[str, Any]) -> None:
    text = render(page).decode()
    assert not {"nan", "inf"} & set(text.lower().split())
    families(text)


# ---- the port -----------------------------------------------------------------------------------


@pytest.fixture
def port() -> Any:
    opened = MetricsPort(0, lambda: render(a_page()), call_s=0.5)
    yield opened
    opened.close()


def get(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as caller:
        caller.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        whole = b""
        while chunk := caller.recv(65_536):
            whole += chunk
    head, _, body = whole.partition(b"\r\n\r\n")
    if not head:
        raise ConnectionError("no answer")
    return int(head.split()[1]), body.decode()


def test_the_port_answers_one_path_and_one_method(port: MetricsPort) -> None:
    status, text = get(port.port, "/metrics")
    assert status == 200
    assert families(text)["fedsplit_round"].samples[0].value == 1
    assert get(port.port, "/")[0] == 404
    assert get(port.port, "/../metrics")[0] == 404
    assert get(port.port, "/metrics", "POST")[0] == 501


def test_slow_callers_cost_themselves(port: MetricsPort) -> None:
    slow = [socket.create_connection(("127.0.0.1", port.port)) for _ in range(2 * MOST_CALLERS)]
    for caller in slow:
        caller.sendall(b"GET /met")
    assert sum(t.name.startswith("Thread") for t in threading.enumerate()) < 4 * MOST_CALLERS
    until = time.monotonic() + 60
    while time.monotonic() < until:  # turned away while the slow ones hold the room
        try:
            assert get(port.port, "/metrics")[0] == 200
            break
        except OSError:
            time.sleep(0.05)
    else:
        pytest.fail("slow callers kept the port from answering")
    for caller in slow:
        caller.close()


def test_a_port_that_is_taken_is_named(port: MetricsPort) -> None:
    with pytest.raises(RunError, match=f"output.metrics-port={port.port}: must be free"):
        MetricsPort(port.port, bytes)


def test_what_was_opened_is_closed_when_the_next_cannot_be(
    port: MetricsPort, tmp_path: Path
) -> None:
    flat = {"output.dir": str(tmp_path), "output.log-json": True, "output.metrics-port": port.port}
    with pytest.raises(RunError):
        Observers(RunConfig.from_flat(flat), 1)
    assert not [h for h in logging.getLogger("strategies").handlers if hasattr(h, "dropped")]


# ---- event files --------------------------------------------------------------------------------


def read_events(path: Path) -> list[tuple[tuple[str, int], float]]:
    """Return ((tag, step), value) of an event file, as TensorBoard reads it."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    version, *events = loader.LegacyEventFileLoader(str(path)).Load()
    assert version.file_version == "brain.Event:2"
    return [((v.tag, e.step), v.simple_value) for e in events for v in e.summary.value]


SCALARS = st.dictionaries(st.text(min_size=1, max_size=20), st.floats(width=32), max_size=5)


@given(st.lists(st.tuples(st.integers(0, 2**62), SCALARS), max_size=4))
@settings(max_examples=40, deadline=None)
def test_scalars_come_back_and_no_number_that_is_none(
    tmp_path_factory: Any, rows: list[tuple[int, dict[str, float]]]
) -> None:
    pytest.importorskip("tensorboard")
    file = EventFile(tmp_path_factory.mktemp("events"))
    for step, scalars in rows:
        file.add(step, scalars)
    file.close()
    expected = [
        ((tag, step), value)
        for step, scalars in rows
        for tag, value in scalars.items()
        if abs(value) < 3e38
    ]
    assert read_events(file.path) == expected


def test_a_full_disk_costs_curves_alone(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    flat = {"output.dir": str(tmp_path), "output.tensorboard": True}
    observers = Observers(RunConfig.from_flat(flat), 1)
    with small_files():
        observers.round_recorded({"round": 1, "train": {"metrics": {"loss": 0.5}}})
    observers.round_recorded({"round": 2, "train": {"metrics": {"loss": 0.25}}})
    observers.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert dict(read_events(file)) == {("train/loss", 2): 0.25}


def test_without_tensorboard_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [*(n for n in sys.modules if n.startswith("tensorboard.")), "tensorboard"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install fedsplit\[tensorboard\]"):
        EventFile(tmp_path)
