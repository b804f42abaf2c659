"""The ledger: no change goes unnoticed, and a process killed at any moment leaves it whole."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedsplit.cli import app_cli
from fedsplit.errors import ConfigError, LedgerError, PolicyError
from fedsplit.owners.ledger import chain as ledger_module
from fedsplit.owners.ledger.chain import (
    HEAD,
    LEDGER,
    STATE,
    TORN,
    Entry,
    Ledger,
    Totals,
    read_ledger,
)
from fedsplit.owners.ledger.exposure import Draw, Exposure

LINES = 7
BOTTOM = "ab" * 32


def entry(i: int, **more: Any) -> Entry:
    made: Entry = {"kind": "representations", "bytes": 100 + i, "run": "7", "mode": "train"}
    made |= {"bottom": BOTTOM, "representation": f"{BOTTOM}:0", "epochs": 0.25, "rho": 1.0}
    made |= {"draw": f"d{i % 3}", "samples": [f"s{i % 4}", f"s{i}"], "tokens": 8, "touched": 1}
    return made | {"mechanism": {"mechanism": "dchi", "eta": 2.0}} | more


def put(ledger: Ledger, made: Entry) -> None:
    ledger.append(lambda totals: dict(made))


def write(folder: Path, count: int = LINES) -> Path:
    folder.mkdir(exist_ok=True)
    with Ledger(folder) as ledger:
        for i in range(count):
            put(ledger, entry(i))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[bytes], bytes]:
    """The lines of a sound ledger, and its head file."""
    folder = write(tmp_path_factory.mktemp("whole"))
    return (folder / LEDGER).read_bytes().splitlines(keepends=True), (folder / HEAD).read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes, bytes], Path]:
    folder = tmp_path_factory.mktemp("scratch")

    def lay(content: bytes, head: bytes) -> Path:
        for path in folder.iterdir():
            path.unlink()
        (folder / LEDGER).write_bytes(content)
        (folder / HEAD).write_bytes(head)
        return folder

    return lay


def first_bad(folder: Path) -> int:
    """Return the number of the line that reading complains of."""
    with pytest.raises(LedgerError) as caught:
        list(read_ledger(folder))
    return int(str(caught.value).split("line ")[1].split(":")[0])


def test_a_sound_ledger_reads_back(whole: Any, scratch: Any) -> None:
    lines, head = whole
    entries = list(read_ledger(scratch(b"".join(lines), head)))
    assert [e["n"] for e in entries] == list(range(LINES))
    assert [e["bytes"] for e in entries] == [100 + i for i in range(LINES)]
    assert entries[-1]["cumulative"] == {
        "samples": 7,
        "views": {"max": 2, "median": 1},
        "eta": {"max": 4.0, "median": 2.0},
    }


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_found_in_its_line(whole: Any, scratch: Any, data: Any) -> None:
    lines, head = whole
    at = data.draw(st.integers(0, LINES - 1))
    line = bytearray(lines[at])
    place = data.draw(st.integers(0, len(line) - 1))
    line[place] = data.draw(st.integers(0, 255).filter(lambda b: b != line[place]))
    assert first_bad(scratch(b"".join([*lines[:at], line, *lines[at + 1 :]]), head)) == at + 1


@settings(max_examples=60, deadline=None)
@given(order=st.lists(st.integers(0, LINES - 1), max_size=LINES + 2))
def test_lines_removed_moved_or_repeated_are_found(whole: Any, scratch: Any, order: Any) -> None:
    lines, head = whole
    if order == list(range(LINES)):
        return
    sound = 0
    while sound < len(order) and order[sound] == sound:
        sound += 1
    assert first_bad(scratch(b"".join(lines[i] for i in order), head)) == sound + 1


def test_a_shortened_ledger_takes_no_more_lines(whole: Any, scratch: Any) -> None:
    lines, head = whole
    with pytest.raises(LedgerError, match=r"5 lines: must be 7 or more, as ledger\.head says"):
        Ledger(scratch(b"".join(lines[:5]), head))


def test_a_changed_ledger_takes_no_more_lines(whole: Any, scratch: Any) -> None:
    lines, head = whole
    lines = [*lines[:2], lines[2].replace(b'"bytes":102', b'"bytes":101'), *lines[3:]]
    with pytest.raises(LedgerError, match="line 3: does not follow"):
        Ledger(scratch(b"".join(lines), head))


# ---- crashes ------------------------------------------------------------------------------------

WRITER = """
import os, sys
from pathlib import Path
from fedsplit.owners.ledger.chain import Ledger
who = sys.argv[2]
with Ledger(Path(sys.argv[1]), sync_every=1 + 7 * (who[-1] == "1")) as ledger:
    for i in range(10**6):
        made = ledger.append(lambda t: {"kind": "slots", "bytes": i, "run": who, "pad": "x" * 300})
        os.write(1, f"{made['bytes']}\\n".encode())
"""


def test_killed_at_any_moment_it_never_reports_too_little(tmp_path: Path) -> None:
    """Two processes write at once and are killed, twenty times over, at moments nobody chose."""
    chance = random.Random(0)
    told: dict[str, int] = {}
    for kill in range(20):
        children = []
        for which in range(2):
            who = f"{kill}-{which}"
            command = [sys.executable, "-c", WRITER, str(tmp_path), who]
            child = subprocess.Popen(command, stdout=subprocess.PIPE)
            children.append((who, child))
        for _, child in children:
            assert child.stdout is not None
            assert child.stdout.readline()  # it has begun
        threading.Event().wait(chance.uniform(0, 0.03))
        for _, child in children:
            child.send_signal(signal.SIGKILL)
        for who, child in children:
            told[who] = 1 + len(child.communicate()[0].splitlines())
    with Ledger(tmp_path):
        pass
    found: dict[str, list[int]] = {who: [] for who in told}
    for line in read_ledger(tmp_path):
        if line["kind"] == "slots":
            found[line["run"]].append(line["bytes"])
    for who, said in told.items():
        assert found[who] == list(range(len(found[who])))
        assert said <= len(found[who]) <= said + 1  # one may be written and not yet told


def test_lines_that_share_a_sync_never_outrun_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head tells of synced lines alone: after a power cut it must not miss what was lost."""
    synced: list[int] = []
    honest = os.fsync

    def sync(fd: int) -> None:
        honest(fd)
        synced.append((tmp_path / LEDGER).read_bytes().count(b"\n"))

    monkeypatch.setattr(ledger_module.os, "fsync", sync)
    kinds = ["hello", "slots", "logit-gradients", "slots", "representations", "slots", "slots"]
    heads = []
    with Ledger(tmp_path, sync_every=3) as ledger:
        for i, kind in enumerate(kinds):
            made = entry(i) if kind == "representations" else {"kind": kind, "bytes": 1}
            put(ledger, made)
            assert (tmp_path / LEDGER).read_bytes().count(b"\n") == i + 1  # written at once
            heads.append(int((tmp_path / HEAD).read_text().split()[0]))
    assert heads == [1, 1, 1, 4, 5, 5, 5]
    assert synced == [1, 4, 5, 7]
    assert [line["kind"] for line in read_ledger(tmp_path)] == kinds
    for wrong in (0, 5000, True, 1.0, "8"):
        with pytest.raises(ConfigError, match=r"ledger-sync=.*must be an integer in"):
            Ledger(tmp_path, sync_every=wrong)  # type: ignore[arg-type]


def test_a_simulations_ledger_is_the_same_but_for_waiting_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "now", lambda: "2026-01-01T00:00:00.000Z")
    folders = [tmp_path / name for name in ("durable", "quick")]
    for folder in folders:
        folder.mkdir()
        if folder.name == "quick":
            monkeypatch.setattr(ledger_module.os, "fsync", None)
        with Ledger(folder, durable=folder.name == "durable") as ledger:
            for i in range(4):
                put(ledger, entry(i))
        with (folder / LEDGER).open("ab") as file:
            file.write(b'{"torn')  # repaired without the disk too
        with Ledger(folder, durable=folder.name == "durable") as ledger:
            put(ledger, entry(4))
        assert len(list(read_ledger(folder))) == 6
    for name in (LEDGER, HEAD, TORN):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1


def test_a_torn_last_line_is_moved_aside_and_told(tmp_path: Path) -> None:
    base = write(tmp_path / "base", 3)
    head = (base / HEAD).read_bytes()
    with Ledger(base) as ledger:
        put(ledger, entry(3))
    content = (base / LEDGER).read_bytes()
    start = content[:-1].rfind(b"\n") + 1
    for number, cut in enumerate(range(start + 1, len(content), 97)):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        (folder / LEDGER).write_bytes(content[:cut])
        (folder / HEAD).write_bytes(head)
        with pytest.raises(LedgerError, match=r"line 4: is cut off after .*never left"):
            list(read_ledger(folder))
        with Ledger(folder) as ledger:
            put(ledger, entry(9))
        assert (folder / TORN).read_bytes() == content[start:cut]
        kinds = [line["kind"] for line in read_ledger(folder)]
        assert kinds == ["representations"] * 3 + ["repair", "representations"]


def test_a_crash_during_the_repair_is_told_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 2)
    with open(tmp_path / LEDGER, "ab") as file:
        file.write(b'{"torn')

    def crash(*args: Any) -> None:
        raise OSError(5, "crash")

    with monkeypatch.context() as patched:
        patched.setattr(ledger_module.os, "ftruncate", crash)
        with pytest.raises(LedgerError, match="crash"):
            Ledger(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "_write", crash)
        with pytest.raises(LedgerError, match="crash"):
            Ledger(tmp_path)
    with Ledger(tmp_path):
        pass
    repair = list(read_ledger(tmp_path))[-1]
    assert repair["kind"] == "repair"
    assert repair["torn"] == len((tmp_path / TORN).read_bytes()) == 2 * len(b'{"torn')


def test_a_full_disk_lets_nothing_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(write(tmp_path, 2))
    honest = os.write

    def full(fd: int, data: bytes) -> int:
        if len(data) > 50:
            return honest(fd, data[:50])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(
            ledger_module.os, "write", lambda fd, data: full(fd, data[:99]) if data else 0
        )
        with pytest.raises(LedgerError, match="No space left"):
            put(ledger, entry(2))
    with pytest.raises(LedgerError, match="No space left"):  # this process has given up
        put(ledger, entry(2))
    with Ledger(tmp_path) as again:
        put(again, entry(2))
    assert len([e for e in read_ledger(tmp_path) if e["kind"] != "repair"]) == 3


# ---- totals -------------------------------------------------------------------------------------


def plain(totals: Totals) -> Any:
    return json.loads(json.dumps(totals.to_json()))


def test_saved_totals_are_those_of_the_lines(tmp_path: Path) -> None:
    write(tmp_path, 5)
    with Ledger(tmp_path) as ledger:
        ledger.save()
        put(ledger, {"kind": "hello", "bytes": 3, "run": "8"})
        saved = (tmp_path / STATE).read_bytes()
        put(ledger, entry(11, run="8"))
    (tmp_path / STATE).write_bytes(saved)  # older than the last lines
    with Ledger(tmp_path) as ledger:
        from_saved = plain(ledger.totals)
    for content in (b"", b"{}", b'{"n": 3}', saved.replace(b'"hash": "', b'"hash": "x')):
        (tmp_path / STATE).write_bytes(content)
        with Ledger(tmp_path) as ledger:
            assert plain(ledger.totals) == from_saved
    assert from_saved["runs"]["8"]["sessions"] == 1
    assert from_saved["runs"]["7"]["passes"]["train"] == pytest.approx(1.25)
    assert from_saved["bytes"] == sum(100 + i for i in range(5)) + 3 + 111


def test_a_refused_line_is_not_written(tmp_path: Path) -> None:
    def refuse(totals: Totals) -> Entry:
        raise PolicyError(f"{totals.bytes} bytes are enough")

    with Ledger(tmp_path) as ledger:
        put(ledger, entry(0))
        with pytest.raises(PolicyError, match="100 bytes"):
            ledger.append(refuse)
        put(ledger, entry(1))
    assert len(list(read_ledger(tmp_path))) == 2


def test_two_ledgers_of_one_home_see_each_others_lines(tmp_path: Path) -> None:
    with Ledger(tmp_path) as one, Ledger(tmp_path) as two:
        put(one, entry(0))
        put(two, entry(1))
        put(one, entry(2))
        assert one.totals.bytes == 303
    assert plain(one.totals)["bytes"] == sum(e["bytes"] for e in read_ledger(tmp_path))


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    with Ledger(write(tmp_path, 1)) as ledger:
        ledger.save()
    for name in (LEDGER, HEAD, STATE):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


DRAWS = st.lists(
    st.tuples(
        st.integers(0, 5), st.lists(st.tuples(st.integers(0, 6), st.integers(0, 2)), min_size=1)
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(history=DRAWS)
def test_different_noises_add_up_and_the_same_counts_once(history: Any) -> None:
    exposure = Exposure()
    model: dict[int, set[tuple[int, int]]] = {}  # text -> (draw, noise)
    for draw, shown in history:
        # Draws 0 and 1 are of one bottom, 2 to 5 of another; eta is the draw's number plus one.
        bottom = "a" if draw < 2 else "b"
        made = Draw(f"{bottom}:0", bottom, {"mechanism": "dchi", "eta": draw + 1.0})
        views = [(str(text), f"{text} {draw} {noise}") for text, noise in shown]
        expected = exposure.views_after(bottom, views)
        exposure.apply(str(draw), made, views)
        for text, noise in shown:
            model.setdefault(text, set()).add((draw, noise))
        of_bottom = {t: [d for d, _ in held if (d < 2) == (draw < 2)] for t, held in model.items()}
        assert expected == (
            max(len(of_bottom[text]) for text, _ in shown),
            max(len(model[text]) for text, _ in shown),
        )
        summary = exposure.summary(f"{bottom}:0")
        counts = sorted(len(held) for held in of_bottom.values() if held)
        etas = sorted(sum(d + 1.0 for d in held) for held in of_bottom.values() if held)
        middle = (len(counts) - 1) // 2
        assert summary["samples"] == len(counts)
        assert summary["views"] == {"max": counts[-1], "median": counts[middle]}
        assert summary["eta"] == {"max": etas[-1], "median": etas[middle]}
    most = exposure.most_exposed(1)[0]
    assert most.views == max(map(len, model.values()))
    assert most.cost == {"eta": sum(d + 1.0 for d, _ in model[int(most.name)])}
    read = Exposure.from_json(json.loads(json.dumps(exposure.to_json())))
    assert read.summary("a:0") == exposure.summary("a:0")
    assert read.most_exposed(9) == exposure.most_exposed(9)


def test_views_of_texts_known_by_their_tokens_count_against_every_text() -> None:
    """Nobody can tell which text an old name was: the most-shown one bounds them all."""
    exposure = Exposure()
    for draw, bottom, names in (
        ("x", "a", "st"),
        ("y", "a", "t"),
        ("z", "b", "s"),
        ("z", "b", "s"),
    ):
        exposure.apply_old(draw, Draw(f"{bottom}:0", bottom, {"mechanism": "none"}), names)
    read = Exposure.from_json(json.loads(json.dumps(exposure.to_json())))
    assert read.views_after("a", [("new", "n")]) == (2 + 1, 2 + 1 + 1)
    assert read.views_after("c", [("new", "n")]) == (1, 2 + 1 + 1)


def test_no_noise_is_called_no_guarantee() -> None:
    exposure = Exposure()
    exposure.apply("x", Draw("a:0", "a", {"mechanism": "none"}), [("s", "n")])
    assert exposure.summary("a:0")["guarantee"] == "none"


# ---- commands -----------------------------------------------------------------------------------


def test_show_and_verify(tmp_path: Path) -> None:
    write(tmp_path, 4)  # four draws of four samples: the fourth line's is the first's
    call = ["ledger", "show", "--home", str(tmp_path), "--tail", "2"]
    shown = CliRunner().invoke(app_cli, call)
    assert shown.exit_code == 0
    assert "406" in shown.stdout  # bytes of all lines
    assert "eta 2, 2" in shown.stdout
    checked = CliRunner().invoke(app_cli, ["ledger", "verify", "--home", str(tmp_path)])
    assert checked.exit_code == 0
    assert "4 lines" in checked.stdout
    path = tmp_path / LEDGER
    path.write_bytes(path.read_bytes().replace(b'"bytes":102', b'"bytes":2'))
    program = "from fedsplit.cli import app; app()"
    broken = subprocess.run(
        [sys.executable, "-c", program, "ledger", "verify", "--home", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert broken.returncode == 1
    assert "line 3" in " ".join(broken.stdout.split())
