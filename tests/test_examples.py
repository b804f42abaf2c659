"""The examples, and the snippets of the docs, run from the installed wheel alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.project import ROOT

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
LIBRARY = ROOT / "docs" / "library.md"
# The clone's folders are out of reach, and fedsplit comes from the folder of the wheel.
RUN = """
import runpy, sys
sys.modules |= dict.fromkeys(("strategies", "simulations", "tests"))
import fedsplit, fedsplit.strategies
for package in (fedsplit, fedsplit.strategies):
    assert package.__file__.startswith(sys.argv[1]), package.__file__
runpy.run_path(sys.argv[2], run_name="__main__")
"""


def run(installed: Path, script: Path, folder: Path) -> str:
    """Run a script beside the installed wheel and return what it printed."""
    own = {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    own |= {"FLWR_TELEMETRY_ENABLED": "0", "HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(installed), str(script)],
        cwd=folder,
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def blocks(page: Path) -> list[str]:
    """Return a page's own Python blocks."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def code_lines(text: str) -> int:
    """Return the number of lines that are neither blank nor a comment alone."""
    return sum(1 for line in text.splitlines() if line.strip() and line.strip()[0] != "#")


def test_there_are_five() -> None:
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_from_the_wheel(name: str, installed: Path, tmp_path: Path) -> None:
    script = ROOT / "examples" / f"{name}.py"
    assert run(installed, script, tmp_path).count("\n") >= 2
    assert f"python examples/{name}.py" in script.read_text()


def test_the_notebook_snippets_run_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    app, *snippets = [*blocks(ROOT / "README.md"), *blocks(LIBRARY)]
    assert len(snippets) == 5
    assert code_lines(app) <= 15
    assert max(map(code_lines, snippets)) <= 10
    script = tmp_path / "snippets.py"
    script.write_text("\n".join([app, *snippets]))
    assert run(installed, script, tmp_path).count("\n") >= 4


def test_an_own_server_app_is_short() -> None:
    """The section that the library page shows; the example runs it."""
    text = (ROOT / "examples" / "own_server_app.py").read_text()
    (section,) = re.findall(r"\[start:app\]\n(.*?)# --8<-- \[end:app\]", text, re.DOTALL)
    assert code_lines(section) <= 15
    assert 'examples/own_server_app.py:app"' in LIBRARY.read_text()
