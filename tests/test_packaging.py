"""What travels: the wheel is the library with the strategies, the app bundle these alone."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.project import ROOT, project_files

# What asks somebody else's machine; the skip rules of tests must not need an answer.
NETWORK = {"requests", "urllib", "urllib3", "httpx", "http", "aiohttp", "ftplib", "huggingface_hub"}


def test_the_wheel_holds_fedsplit_with_the_strategies_inside(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry = next(n for n in names if n.endswith("entry_points.txt"))
        assert "fedsplit = fedsplit.cli:app" in archive.read(entry).decode()
    tops = {name.split("/")[0] for name in names}
    assert len(tops) == 2
    assert "fedsplit" in tops
    assert (tops - {"fedsplit"}).pop().endswith(".dist-info")
    own = {name for name in project_files() if name.startswith("fedsplit/")}
    own -= {"fedsplit/strategies.py"}  # a clone's stand-in for the folder
    own |= {f"fedsplit/{name}" for name in project_files() if name.startswith("strategies/")}
    assert {name for name in names if name.startswith("fedsplit/")} == own
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_an_editable_install_points_at_the_clone(clone: Path, tmp_path: Path) -> None:
    """A copy of the strategies beside the path entry would go stale."""
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(clone))
    path = next(iter(builder.build(directory=str(tmp_path), versions=["editable"])))
    with zipfile.ZipFile(path) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".py")]
        assert archive.read("_fedsplit.pth").decode() == str(clone)


def test_a_clone_has_each_strategy_module_once_under_both_names() -> None:
    code = """
import fedsplit.strategies.rounds.averaging as one
import strategies.rounds.averaging as other
from fedsplit.strategies import STRATEGIES
import fedsplit, strategies
assert one is other and one.__spec__.name == "strategies.rounds.averaging"
assert fedsplit.strategies is strategies and STRATEGIES is strategies.STRATEGIES
try:
    import fedsplit.strategies.absent
except ModuleNotFoundError as error:
    assert error.name == "fedsplit.strategies.absent"
else:
    raise AssertionError("a module that is not there was imported")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_console_script_is_there() -> None:
    assert (ROOT / "fedsplit" / "cli.py").is_file(), "pyproject.toml names fedsplit.cli:app"


def test_the_app_bundle_is_the_model_owners_side_alone(clone: Path, tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    flwr = Path(sys.executable).parent / "flwr"
    if not flwr.exists():
        pytest.skip("the flwr command is not beside this Python")
    own = {"HOME": str(tmp_path), "FLWR_HOME": str(tmp_path), "FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run(
        [str(flwr), "build", "--app", str(clone)],
        cwd=tmp_path,
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (bundle,) = [*tmp_path.glob("*.fab"), *clone.glob("*.fab")]
    assert bundle.stat().st_size < 10 << 20
    with zipfile.ZipFile(bundle) as archive:
        names = set(archive.namelist())
        assert not any(len(archive.read(name)) == 0 and "." not in name for name in names)
    assert "pyproject.toml" in names
    modules = {name for name in project_files() if name.startswith("strategies/")}
    modules = {name for name in modules if name.endswith(".py")}
    assert modules
    assert modules <= names
    foreign = {name for name in names if name.split("/")[0] in ("fedsplit", "simulations", "tests")}
    assert foreign == set()
    rest = {name for name in names - modules if not name.startswith((".info/", "META-INF/"))}
    assert {name for name in rest if name.endswith(".py")} == set()


def test_a_bundle_drops_modules_that_are_named_like_tests() -> None:
    """Flower leaves out ``test_*.py`` and ``*_test.py``, folders ``lib`` and ``build``."""
    for path in (ROOT / "strategies").rglob("*.py"):
        assert not path.name.startswith("test_"), path
        assert not path.stem.endswith("_test"), path
        assert not {"lib", "build"} & set(path.relative_to(ROOT).parts), path


def test_no_test_needs_the_network_to_know_whether_to_skip() -> None:
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            found += [f"{path}: {name}" for name in names if name.split(".")[0] in NETWORK]
            call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if call and node.func.attr in ("gethostbyname", "getaddrinfo"):
                found.append(f"{path}:{node.lineno}: {node.func.attr}")
    assert not found, "\n".join(found)


def test_requirements_are_ranges_and_ray_is_flowers_to_pin() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"].values()
    every = [*project["dependencies"], *(name for names in optional for name in names)]
    for requirement in every:
        assert "==" not in requirement, f"{requirement}: a library requires ranges"
        assert not requirement.startswith("ray"), "flwr pins ray"
    assert project["requires-python"] == ">=3.11"
