"""The view of a run: from files alone, whatever state they are in."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedsplit.config import RunConfig
from fedsplit.errors import RunError
from fedsplit.wire.frames import Kind
from fedsplit.wire.link import loopback
from simulations.core.watch import View, clean, draw, find, refresh, watch
from strategies.rounds.recorder import Recorder
from strategies.telemetry.observers import Observers


def shown(folder: Path) -> str:
    console = Console(file=io.StringIO(), width=160)
    watch(folder, console, once=True)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A server's folder in the middle of round 2."""
    flat: dict[str, Any] = {
        "output.dir": str(tmp_path / "server"),
        "output.log-json": True,
        "privacy.mechanism": "dchi",
        "privacy.eta": 10.0,
    }
    config = RunConfig.from_flat(flat)
    recorder = Recorder.of(config, 7)
    recorder.write(status="running")
    recorder.round_started(1, "train", 2)
    left, right = loopback(1 << 16)
    recorder.session_opened("owner-0", 5, left)
    right.send(Kind.BYE, {"reason": "done"})
    left.recv(20.0)
    part = {
        "finished": ["owner-0"],
        "lost": {"owner-1": "DeadlineError: no frame within 5 s"},
        "steps": 3,
        "samples": 4,
        "row_tokens": 1234,
        "bytes_up": 2_000_000,
        "metrics": {"loss": 0.625, "owners": {"owner-0": {"loss": 0.625}}},
    }
    lineage = {"round": 1, "verdict": "in_lineage", "score": 0.875}
    recorder.round({"round": 1, "train": part, "lineage": lineage})
    recorder.round_started(2, "train", 2)
    recorder.close()
    return tmp_path


def test_rounds_owners_privacy_and_verdicts_are_shown(run: Path) -> None:
    text = shown(run)
    for expected in (
        "split-tuning",
        "round 2 of 3",
        "privacy dchi eta=10: 1,234 tokens seen",
        "owner-0",
        "finished",
        "owner-1",
        "DeadlineError: no frame within 5 s",
        "0.6250",
        "in_lineage",
        "0.8750",
        "2.0 MB",
    ):
        assert expected in text, expected


def test_a_server_of_an_older_version_is_shown_too(run: Path) -> None:
    (run / "server" / "progress.json").unlink()
    text = shown(run)
    assert "1 rounds recorded" in text
    assert "owner-1" in text


def test_half_written_files_leave_the_view_as_it_was(run: Path) -> None:
    view = refresh(View(run / "server"))
    before = view.page
    for name in ("progress.json", "server.json"):
        path = run / "server" / name
        path.write_bytes(path.read_bytes()[:50])
    assert refresh(view).page == before
    Console(file=io.StringIO()).print(draw(view))


def test_a_run_that_ends_is_not_watched_for_ever(run: Path) -> None:
    path = run / "server" / "server.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "status": "completed"}))
    watch(run, Console(file=io.StringIO()), every_s=0.01)


def test_the_newest_run_of_several_is_shown(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b", "c")):
        folder = tmp_path / name / "server"
        folder.mkdir(parents=True)
        (folder / "server.json").write_text("{}")
        os.utime(folder / "server.json", (number % 2, number % 2))
    assert find(tmp_path) == tmp_path / "b" / "server"


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no progress\.json or server\.json"):
        find(tmp_path)


def test_what_others_chose_cannot_speak_to_the_terminal(run: Path) -> None:
    path = run / "server" / "progress.json"
    page = json.loads(path.read_text())
    page["owners"][0]["name"] = "\x1b[2J\x1b]0;title\x07[red]x[/red]\u202e"
    path.write_text(json.dumps(page))
    text = shown(run)
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    assert "[red]x[/red]" in text


def test_clean_keeps_what_can_be_shown() -> None:
    assert clean("owner-1 ü", 20) == "owner-1 ü"
    assert clean("a\nb\x00", 20) == "a?b?"
    assert clean("x" * 30, 10) == "x" * 9 + "…"


def test_observers_do_not_disturb_a_run_whose_disk_is_gone(tmp_path: Path) -> None:
    observers = Observers(RunConfig.from_flat({"output.dir": str(tmp_path / "x")}), 1)
    (tmp_path / "x").rmdir()
    observers.round_started(1, "train", 1)
    observers.round_recorded({"round": 1, "train": {"finished": [], "metrics": {}}})
    observers.close()
