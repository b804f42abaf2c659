"""The long commands of README and docs, made small, as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands.blocks import DocCommand, doc_commands
from tests.commands.scene import scene, words_of
from tests.commands.table import RUNBOOK, How, how_of
from tests.project import ROOT

pytestmark = pytest.mark.e2e
LONG = {
    found.text: found
    for found in doc_commands()
    if found.page != RUNBOOK and isinstance(how := how_of(found.text), How) and how.long
}


@pytest.fixture(scope="module")
def _reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with scene(tmp_path_factory.mktemp("reader")):
        yield


@pytest.mark.timeout(900)
@pytest.mark.parametrize("found", LONG.values(), ids=lambda found: found.text[:60])
@pytest.mark.usefixtures("_reader")
def test_a_long_command_does_what_its_page_says(found: DocCommand, tmp_path: Path) -> None:
    how = how_of(found.text)
    assert isinstance(how, How)
    program, words = words_of(found.text, how)
    if "--out" not in words and words[0] in ("run", "sweep"):
        words += ["--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, *program.split()[1:], *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in how.codes, f"{found}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
