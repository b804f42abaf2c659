"""What is printed can neither be taken for markup nor end what is being done."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from fedsplit.errors import ConfigError
from fedsplit.observe.console import PlainConsole, console
from simulations.__main__ import main
from simulations.core.kinds import KINDS
from simulations.core.progress import RunProgress
from simulations.core.run_folder import RunFolder, read_results
from simulations.core.settings import Experiment
from simulations.runtime.child_processes import LogLine
from tests.project import ROOT, project_files

HOSTILE = "[/red] [bold]x[/bold] :warning: a→b ≥ \N{GRINNING FACE} $x^{"


def printed(*objects: object, **settings: object) -> str:
    file = io.StringIO()
    PlainConsole(file, width=120, **settings).print(*objects)
    return file.getvalue()


def test_every_text_is_shown_as_it_is() -> None:
    assert HOSTILE in printed(HOSTILE)
    assert printed(table()).count(HOSTILE) == 3


def test_an_error_is_one_paragraph_without_escapes() -> None:
    file = io.StringIO()
    PlainConsole(file, width=40).error(ConfigError(f"{HOSTILE} \x1b[2J" + "x" * 100))
    assert file.getvalue() == f"ConfigError: {HOSTILE} \\x1b[2J" + "x" * 100 + "\n"


def test_only_one_module_makes_consoles_and_none_writes_markup() -> None:
    found = []
    for name in project_files():
        if not name.endswith(".py") or name.split("/")[0] in ("tests", "examples"):
            continue
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id == "Console":
                found.append(f"{name}: makes a console of its own")
            if isinstance(node, ast.ImportFrom) and node.module == "rich.markup":
                found.append(f"{name}: imports rich.markup")
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and ("[/]" in text or "[/red]" in text):
                found.append(f"{name}: {text[:40]!r} reads as markup")
    assert not found


def table() -> Table:
    made = Table(HOSTILE, title=HOSTILE)
    made.add_row(HOSTILE)
    return made


def prints(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """An experiment that prints, as all do, when its results are recorded."""
    folder.record(rows=[{"a": HOSTILE}])
    with RunProgress(console) as progress:
        progress.stage(HOSTILE)
        progress.update(1.0, HOSTILE)
        progress.on_line(LogLine("server", f"refused: {HOSTILE}"))
    for _ in range(50):  # more than is buffered
        console.print(table())


def pipe_without_reader() -> int:
    reads, writes = os.pipe()
    os.close(reads)
    return writes


@pytest.mark.parametrize("out", ["cp1252", "ascii", "closed pipe", "full disk", "none"])
def test_a_run_completes_whatever_becomes_of_its_output(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    out: str,
) -> None:
    asked, run = tmp_path / "printing.toml", tmp_path / "[/bold] run"
    about = json.dumps(HOSTILE, ensure_ascii=False)
    asked.write_text(f"kind = 'printing'\nabout = {about}\n", encoding="utf-8")
    monkeypatch.setitem(KINDS, "printing", prints)
    monkeypatch.setattr(sys, "argv", ["simulations", "run", str(asked), "--out", str(run)])
    monkeypatch.setattr(console._output, "lost", None)
    stream = None
    if out != "none":
        place: int | str | Path = tmp_path / "told"
        if out == "closed pipe":
            place = pipe_without_reader()
        elif out == "full disk":
            place = "/dev/full"
        encoding = out if out in ("cp1252", "ascii") else "utf-8"
        stream = open(place, "w", encoding=encoding)  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as end:
        main()
    monkeypatch.undo()
    if stream is not None:
        stream.close()
    assert read_results(run)["status"] == "completed"
    assert (run / "report.html").exists()
    assert end.value.code == (1 if out == "full disk" else 0)
    assert ("lost what was printed: " in capsys.readouterr().err) == (out == "full disk")
    if out in ("cp1252", "ascii"):
        told = (tmp_path / "told").read_text(encoding=out)
        assert "[/red] [bold]x[/bold] :warning: a\\u2192b \\u2265 \\U0001f600 $x^{" in told


@pytest.mark.parametrize(("shell", "code"), [("| head -n 1", 0), ("> /dev/full", 1), (">&-", 0)])
def test_a_command_ends_quietly_when_nobody_reads_it(shell: str, code: int) -> None:
    script = (
        "from fedsplit.observe.console import console, run_command_line\n"
        "run_command_line(lambda: [console.print('x' * 70) for _ in range(3000)])\n"
    )
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$0" -c "$1" {shell}', sys.executable, script],
        cwd=ROOT,
        capture_output=True,
        check=False,
        timeout=60,
    )
    told = done.stderr.decode()
    assert done.returncode == code, told
    assert told.count("\n") == code
