"""Every command of README and docs runs, or says why not; long ones run with ``make test-e2e``."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from simulations.split import federated_run
from tests.commands.blocks import DocCommand, doc_commands
from tests.commands.scene import check_result, command, scene, simulate_here, skip_without
from tests.commands.table import COMMANDS, NOT_RUN, OWN, RUNBOOK, TINY_RUN, How, how_of

FOUND = [found for found in doc_commands() if found.page != RUNBOOK]
QUICK = {}
for one in FOUND:
    told = how_of(one.text)
    if isinstance(told, How) and not told.long:
        QUICK.setdefault(one.text, one)


@pytest.fixture(scope="module")
def _reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A reader's folder, after the first commands of README; one thread for its small models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, scene(tmp_path_factory.mktemp("reader")):
        patch.setattr(federated_run, "simulate", simulate_here)
        how = How(OWN, f"{TINY_RUN} --out runs/demo")
        own = next(one.text for one in FOUND if "data.kind=file" in one.text)
        check_result(command(own, how), how, own)
        shutil.copytree("runs/demo", "runs/mine")
        how = How()
        check_result(command("fedsplit policy init", how), how, "fedsplit policy init")
        patch.setenv("FEDSPLIT_HOME", str(Path("runs/demo/homes/owner-0").absolute()))
        yield
    torch.set_num_threads(threads)


def test_every_command_is_run_or_says_why_not() -> None:
    assert len(FOUND) > 40
    unknown = [str(found) for found in FOUND if how_of(found.text) is None]
    assert not unknown, "a row in tests/commands/table.py says how each of these is run"
    used = {name for name in (*COMMANDS, *NOT_RUN) if any(f.text.startswith(name) for f in FOUND)}
    assert used == {*COMMANDS, *NOT_RUN}, "a row for a command that no page has"


@pytest.mark.parametrize("found", QUICK.values(), ids=lambda found: found.text[:60])
@pytest.mark.usefixtures("_reader")
def test_a_command_does_what_its_page_says(found: DocCommand) -> None:
    how = how_of(found.text)
    assert isinstance(how, How)
    skip_without(how)
    if found.text.endswith("policy init"):
        Path("owner.toml").unlink()  # a new file is made
    check_result(command(found.text, how), how, found)
