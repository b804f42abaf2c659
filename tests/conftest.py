"""Fixtures that several folders use."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from tests.project import ROOT, project_files

# Two test processes share two cores: with more than one thread each, OpenMP's threads wait for each
# other by spinning, and a suite takes several times the processor time. Set before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is no error of the code; speed is measured by ``python -m simulations bench``.
settings.register_profile("fedsplit", deadline=None)
settings.load_profile("fedsplit")
# Consoles fix their width when they are made: tests that want one say so themselves.
os.environ.pop("COLUMNS", None)


# torch and transformers make hundreds of thousands of objects that stay: looking through them for
# garbage every 700 new ones takes a good part of a suite's time.
gc.set_threshold(10_000, 20, 20)


def pytest_collection_finish() -> None:
    """Leave what is loaded by now out of every later collection of garbage: it stays for ever."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project as a clone would have it."""
    folder = tmp_path_factory.mktemp("clone") / "fedsplit"
    for name in project_files():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    return folder


@pytest.fixture(scope="session")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the clone."""
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(clone))
    folder = tmp_path_factory.mktemp("wheel")
    return Path(next(iter(builder.build(directory=str(folder), versions=["standard"]))))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel alone is installed into."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run(
        [*pip, "--no-deps", "--no-index", "--target", str(folder), str(wheel)],
        check=True,
        timeout=120,
    )
    return folder
