"""The examples, and the snippets of the docs, run from the installed wheel alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.project import ROOT

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
LIBRARY = ROOT / "docs" / "library.md"
# The clone's folders are out of reach, and fedsplit comes from the folder of the wheel.  One
# interpreter runs the scripts one after the other: each alone would load torch and Flower, and read
# the standard library's docstrings, anew.
SERVE = """
import contextlib, io, json, os, runpy, sys, traceback
sys.modules |= dict.fromkeys(("strategies", "simulations", "tests"))
import fedsplit, fedsplit.strategies
for package in (fedsplit, fedsplit.strategies):
    assert package.__file__.startswith(sys.argv[1]), package.__file__
answers = sys.stdout
for line in sys.stdin:
    script, folder = json.loads(line)
    os.chdir(folder)
    printed, fault = io.StringIO(), ""
    with contextlib.redirect_stdout(printed):
        try:
            runpy.run_path(script, run_name="__main__")
        except BaseException:
            fault = traceback.format_exc()
    print(json.dumps([printed.getvalue(), fault]), file=answers, flush=True)
"""
Run = Callable[[Path, Path], str]


@pytest.fixture(scope="module")
def run(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Return a function that runs a script in a folder, beside the installed wheel: its output."""
    home = tmp_path_factory.mktemp("home")
    own = {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    own |= {"FLWR_TELEMETRY_ENABLED": "0", "HOME": str(home)}
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, str(installed)],
        cwd=home,
        env=os.environ | own,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        asked, answered = process.stdin, process.stdout
        assert asked is not None
        assert answered is not None

        def carry_out(script: Path, folder: Path) -> str:
            asked.write(json.dumps([str(script), str(folder)]) + "\n")
            asked.flush()
            line = answered.readline()
            assert line, "the interpreter ended"
            printed, fault = json.loads(line)
            assert not fault, fault[-4000:]
            return str(printed)

        yield carry_out
        asked.close()
        process.kill()


def blocks(page: Path) -> list[str]:
    """Return a page's own Python blocks."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def code_lines(text: str) -> int:
    """Return the number of lines that are neither blank nor a comment alone."""
    return sum(1 for line in text.splitlines() if line.strip() and line.strip()[0] != "#")


def test_there_are_five() -> None:
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_from_the_wheel(name: str, run: Run, tmp_path: Path) -> None:
    script = ROOT / "examples" / f"{name}.py"
    assert run(script, tmp_path).count("\n") >= 2
    assert f"python examples/{name}.py" in script.read_text()


def test_the_notebook_snippets_run_from_the_wheel(run: Run, tmp_path: Path) -> None:
    app, *snippets = [*blocks(ROOT / "README.md"), *blocks(LIBRARY)]
    assert len(snippets) == 5
    assert code_lines(app) <= 15
    assert max(map(code_lines, snippets)) <= 10
    script = tmp_path / "snippets.py"
    script.write_text("\n".join([app, *snippets]))
    assert run(script, tmp_path).count("\n") >= 4


def test_an_own_server_app_is_short() -> None:
    """The section that the library page shows; the example runs it."""
    text = (ROOT / "examples" / "own_server_app.py").read_text()
    (section,) = re.findall(r"\[start:app\]\n(.*?)# --8<-- \[end:app\]", text, re.DOTALL)
    assert code_lines(section) <= 15
    assert 'examples/own_server_app.py:app"' in LIBRARY.read_text()
