"""One run, one folder: atomic, strict, honest about how the run ended."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import stat
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from fedsplit.errors import ConfigError, RunError, SessionError
from simulations.core.run_folder import (
    REQUIRED,
    RunFolder,
    check_results,
    default_folder,
    read_results,
    write_atomically,
)
from simulations.faults.session_faults import small_disk
from simulations.runtime.machine import commit
from tests.project import ROOT

TABLE = {"rows": [{"round": 1, "loss": 0.5}], "metrics": {"accuracy": 0.9}}


def raw(path: Path) -> dict[str, object]:
    document = json.loads((path / "results.json").read_text())
    assert isinstance(document, dict)
    return document


def test_folder_records_versions_machine_time_and_results(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", name="demo", kind="table") as folder:
        assert raw(folder.path)["status"] == "running"
        folder.record(**TABLE)

    document = read_results(tmp_path / "run")

    assert document["status"] == "completed"
    assert {key: document[key] for key in TABLE} == TABLE
    assert document["versions"]["python"].startswith("3.")
    assert document["versions"]["numpy"] == np.__version__
    assert set(document["versions"]) == {
        *("python", "fedsplit", "flwr", "ray", "torch", "transformers", "numpy", "commit")
    }
    assert document["machine"]["cores"] >= 1
    assert document["machine"]["memory_bytes"] > 2**20
    assert document["machine"]["cpu"]
    assert document["started"] <= document["ended"]
    assert document["time_s"] >= 0
    assert document["error"] is None


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("boom"), "failed"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(143), "interrupted"),
    ],
)
def test_partial_results_are_kept_and_marked(
    tmp_path: Path, error: BaseException, status: str
) -> None:
    def run() -> None:
        with RunFolder(tmp_path, name="demo", kind="table") as folder:
            folder.record(rows=[{"round": 1}])
            raise error

    with pytest.raises(type(error)):
        run()

    document = read_results(tmp_path)

    assert document["status"] == status
    assert document["rows"] == [{"round": 1}]
    assert type(error).__name__ in document["error"]


def test_completed_run_is_not_overwritten_unless_forced(tmp_path: Path) -> None:
    with RunFolder(tmp_path, name="first", kind="table") as folder:
        folder.record(**TABLE)

    with pytest.raises(RunError, match="holds a completed run"):
        RunFolder(tmp_path, name="second", kind="table")
    assert raw(tmp_path)["name"] == "first"

    RunFolder(tmp_path, name="second", kind="table", force=True)
    assert raw(tmp_path)["name"] == "second"


@pytest.mark.parametrize("force", [False, True])
def test_two_runs_never_share_a_folder(tmp_path: Path, force: bool) -> None:
    with RunFolder(tmp_path, name="first", kind="table") as folder:
        (tmp_path / "server").mkdir()
        folder.record(**TABLE)
        before = (tmp_path / "results.json").read_bytes()
        with pytest.raises(RunError, match="another run is at work in this folder"):
            RunFolder(tmp_path, name="second", kind="table", force=force)
        assert (tmp_path / "results.json").read_bytes() == before
        assert (tmp_path / "server").exists()
    assert not (tmp_path / ".lock").exists()
    RunFolder(tmp_path, name="second", kind="table", force=True).mark("interrupted")


def test_a_killed_run_holds_nobody_up(tmp_path: Path) -> None:
    killed = (
        "import os, pathlib, sys; from simulations.core.run_folder import RunFolder\n"
        "folder = RunFolder(pathlib.Path(sys.argv[1]), name='x', kind='table'); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", killed, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == 9
    assert raw(tmp_path)["status"] == "running"
    RunFolder(tmp_path, name="second", kind="table").mark("interrupted")


@pytest.mark.parametrize("name", ["server", "homes"])
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "work").write_text("years")
    with pytest.raises(RunError, match=rf"holds {name} but no results\.json"):
        RunFolder(tmp_path, name="x", kind="table", force=True)
    assert (tmp_path / name / "work").exists()


def test_unfinished_run_may_be_repeated(tmp_path: Path) -> None:
    RunFolder(tmp_path, name="first", kind="table").mark("interrupted")
    assert RunFolder(tmp_path, name="second", kind="table").status == "running"


def test_completing_without_required_keys_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, name="demo", kind="table")
    folder.record(metrics={})
    with pytest.raises(RunError, match=r"rows: missing"):
        folder.mark("completed")
    assert raw(tmp_path)["status"] == "running"


def test_values_that_json_lacks_become_null_with_a_note(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, name="demo", kind="table")
    folder.record(
        metrics={"loss": math.nan, "best": -math.inf, "f1": np.float32(0.5), "p": tmp_path},
        rounds=({"round": 1, "losses": np.array([1.0, np.nan])},),
    )

    text = (tmp_path / "results.json").read_text()
    document = raw(tmp_path)

    assert "NaN" not in text
    assert "Infinity" not in text
    assert document["metrics"] == {"loss": None, "best": None, "f1": 0.5, "p": str(tmp_path)}
    assert document["rounds"] == [{"round": 1, "losses": [1.0, None]}]
    assert document["notes"] == [
        "metrics.loss: nan written as null",
        "metrics.best: -inf written as null",
        "rounds[0].losses[1]: nan written as null",
    ]


def test_values_json_cannot_express_are_refused_and_the_file_stays(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, name="demo", kind="table")
    with pytest.raises(ConfigError, match=r"metrics\.model=object"):
        folder.record(metrics={"model": object()})
    assert "metrics" not in raw(tmp_path)
    folder.record(rows=[])  # the refused value is not remembered
    assert raw(tmp_path)["rows"] == []
    assert "metrics" not in raw(tmp_path)


def test_keys_that_every_run_has_cannot_be_overwritten(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, name="demo", kind="table")
    with pytest.raises(ConfigError, match="status"):
        folder.record(status="completed")


def test_full_disk_names_path_and_bytes_and_keeps_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path, name="demo", kind="table")
    folder.record(rounds=[{"round": 1}])
    before = (tmp_path / "results.json").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"results\.json: cannot write \d+ bytes: No space left"):
        folder.record(rounds=[{"round": 1}, {"round": 2}])
    monkeypatch.undo()

    assert (tmp_path / "results.json").read_bytes() == before
    assert sorted(x.name for x in tmp_path.iterdir()) == [".lock", "log", "results.json"]


def fill_and_fail(disk: Path, told: str) -> None:
    with RunFolder(disk / "run", name="demo", kind="table") as folder:
        folder.record(rows=[{"loss": 0.5}] * 200)
        with suppress(OSError), (disk / "rest").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1024))
        with pytest.raises(RunError, match="No space left"):
            folder.record(rows=[{"loss": 0.25}] * 200)
        raise ZeroDivisionError(told)


@pytest.mark.parametrize("told", ["disk", "long " * 4000, "\N{GRINNING FACE}" * 4000])
def test_a_full_disk_hides_neither_the_error_nor_how_the_run_ended(
    tmp_path: Path, told: str
) -> None:
    disk = tmp_path / "disk"
    try:
        with small_disk(disk, "128k"):
            with pytest.raises(ZeroDivisionError):
                fill_and_fail(disk, told)
            document = read_results(disk / "run")
    except SessionError as error:
        pytest.skip(str(error))
    assert document["status"] == "failed"
    assert document["rows"] == [{"loss": 0.5}] * 200  # what was recorded last
    assert document["error"].startswith(f"ZeroDivisionError: {told[:400]}")
    assert document["ended"] is not None


def test_failure_to_record_does_not_hide_the_runs_own_error(
    tmp_path: Path,
) -> None:
    def run() -> None:
        with RunFolder(tmp_path / "gone", name="demo", kind="table") as folder:
            shutil.rmtree(folder.path)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()


def test_config_toml_reads_back(tmp_path: Path) -> None:
    data = {"name": 'an "é"\n', "noise.eta": 1.5, "none": None}
    config = {"rounds": 3, "data": data, "dims": [1, 2], "none": None}
    folder = RunFolder(tmp_path, name="demo", kind="table")
    folder.write_config(config)
    assert tomllib.loads((tmp_path / "config.toml").read_text()) == {
        "rounds": 3,
        "data": {"name": 'an "é"\n', "noise.eta": 1.5},
        "dims": [1, 2],
    }
    for wrong in (object(), "\ud800"):
        with pytest.raises(ConfigError, match=r"config\.toml: "):
            folder.write_config({"a": {"b": wrong}})


def test_write_atomically_leaves_ordinary_permissions(tmp_path: Path) -> None:
    write_atomically(tmp_path / "x", b"1")
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644


def test_default_folder_is_named_after_run_and_time(tmp_path: Path) -> None:
    first = default_folder("split/base run", tmp_path)
    assert first.name.startswith("split-base-run-2")
    assert first.is_dir()  # nobody else gets it
    second = default_folder("split/base run", tmp_path)
    assert second != first
    assert second.is_dir()
    assert default_folder("../..", tmp_path).parent == tmp_path


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file: cannot be made a run folder"):
        RunFolder(tmp_path / "file", name="demo", kind="table")


def test_unknown_kind_and_status_list_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kind='x'.*table"):
        RunFolder(tmp_path, name="demo", kind="x")
    folder = RunFolder(tmp_path, name="demo", kind="split")
    with pytest.raises(ConfigError, match=r"status='done'.*interrupted"):
        folder.mark("done")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "results", "message"),
    [
        ("table", {}, r"rows: missing"),
        ("table", {"rows": {}}, r"rows: must be a list"),
        ("table", {"rows": ["x"]}, r"rows\[0\]: must be a table"),
        ("split", {"utility": {"metric": "accuracy"}}, r"utility: lacks federated"),
        ("split", {"utility": []}, r"utility: must be a table"),
        ("other", {}, r"kind='other': must be one of"),
    ],
)
def test_schema_check_names_what_is_missing(
    kind: str, results: dict[str, object], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        check_results(kind, results)


@pytest.mark.parametrize("kind", sorted(REQUIRED))
def test_every_kind_accepts_its_smallest_results(kind: str) -> None:
    smallest: dict[str, object] = {}
    for key, shape in REQUIRED[kind].items():
        form, columns = shape or ("table", ())
        smallest[key] = dict.fromkeys(columns) if form == "table" else []
    check_results(kind, smallest)


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1}', '{"schema": NaN}'])
def test_unreadable_results_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(RunError, match=r"results\.json"):
        read_results(tmp_path)


def test_the_commit_of_a_checkout_is_told_and_whether_files_differ(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *who, *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    assert commit(tmp_path) is None
    (tmp_path / "a").write_text("1")
    for arguments in (("init", "-q"), ("add", "a"), ("commit", "-qm", "x")):
        git(*arguments)
    head = git("rev-parse", "HEAD")
    assert commit(tmp_path) == head
    (tmp_path / "a").write_text("2")
    assert commit(tmp_path) == f"{head}+"
