"""Nothing of an app is written or imported before its digest is the one that the policy pins.

The guard stands between functions of Flower's own ``run_clientapp``; here they are Flower's real
ones, and only what talks to a SuperNode is played.
"""

from __future__ import annotations

import importlib
import io
import os
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.utils import get_sha256_hash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsplit.deploy.guard import CLIENT_APP, Guard, check_flower, verify_bundle
from fedsplit.deploy.start import COMMANDS, make_shims, owner_environment, superexec_command
from fedsplit.errors import ConfigError, PolicyError, RunError
from fedsplit.owners.app_digest import digest_of_app, digest_of_bundle, files_of_bundle

MODULE = "flwr.supernode.runtime.run_clientapp"
PROJECT = """
[project]
name = "tinyapp"
version = "1.0.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "tests"
[tool.flwr.app.components]
serverapp = "server_{n}:app"
clientapp = "client_{n}:app"
[tool.flwr.app.config]
"""


def bundle_of(files: dict[str, str], folder: Path) -> bytes:
    """Return a bundle as Flower writes it: the files and a manifest of their hashes."""
    lines = []
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in sorted(files.items()):
            path = folder / "draft"
            path.write_text(text)
            lines.append(f"{name},{get_sha256_hash(path)},{len(text) * 8}")
            archive.writestr(name, text)
        archive.writestr(".info/CONTENT", "\n".join(lines))
    return buffer.getvalue()


class Machine:
    """An owner's machine with an app in the making."""

    number = 0

    def __init__(self, root: Path) -> None:
        Machine.number += 1  # modules stay imported, so each app has names of its own
        self.root = root
        self.policy = root / "owner.toml"
        self.mark = root / "ran"
        self.name = f"client_{Machine.number}"
        self.files = {
            "pyproject.toml": PROJECT.format(n=Machine.number),
            f"{self.name}.py": (
                "from pathlib import Path\nfrom flwr.clientapp import ClientApp\n"
                f"Path({str(self.mark)!r}).write_text('ran')\napp = ClientApp()\n"
            ),
        }

    @property
    def bundle(self) -> bytes:
        return bundle_of(self.files, self.root)

    def pin(self, digest: str) -> None:
        self.policy.write_text(f'[app]\ndigest = "{digest}"\n')
        self.policy.chmod(0o600)

    @property
    def installed(self) -> list[Path]:
        apps = self.root / "flower" / "apps"
        return sorted(apps.iterdir()) if apps.is_dir() else []

    def run(self, bundle: bytes, kind: str = CLIENT_APP, run: tuple[str, ...] = ()) -> Any:
        """Do what ``run_clientapp`` does with a bundle, through the guarded functions."""
        real = importlib.import_module(MODULE)
        module = types.ModuleType("played")
        vars(module).update(vars(real))
        Guard(self.policy, kind).attach(module)
        module.install_from_fab(bundle, skip_prompt=True)
        loader = module.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
        return loader(*(run or ("tests/tinyapp", "1.0.0", "0" * 64)))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    path = list(sys.path)
    yield Machine(tmp_path)
    sys.path[:] = path


def test_the_reviewed_app_runs(machine: Machine) -> None:
    machine.pin(digest_of_bundle(machine.bundle))
    app = machine.run(machine.bundle)
    assert machine.mark.exists()
    assert type(app).__name__ == "ClientApp"
    assert digest_of_app(machine.installed[0]) == digest_of_bundle(machine.bundle)


def test_a_changed_app_is_neither_written_nor_imported(machine: Machine) -> None:
    reviewed = digest_of_bundle(machine.bundle)
    machine.pin(reviewed)
    machine.files[f"{machine.name}.py"] += "\n"
    changed = digest_of_bundle(machine.bundle)
    with pytest.raises(PolicyError, match=f"asked '{changed}', must be {reviewed}"):
        machine.run(machine.bundle)
    assert not machine.mark.exists()
    assert machine.installed == []


@pytest.mark.parametrize(
    ("policy", "mode", "named"),
    [
        (None, 0o600, "cannot be used"),
        ("[app]\n", 0o600, "must be set"),
        ("[app", 0o600, "cannot be used"),
        ('[app]\ndigest = "PINNED"\n', 0o666, "cannot be used"),
    ],
)
def test_without_a_pinned_digest_nothing_runs(
    machine: Machine, policy: str | None, mode: int, named: str
) -> None:
    if policy is not None:
        pinned = policy.replace("PINNED", digest_of_bundle(machine.bundle))
        machine.policy.write_text(pinned)
        machine.policy.chmod(mode)
    with pytest.raises(PolicyError, match=named):
        machine.run(machine.bundle)
    assert not machine.mark.exists()


def test_a_folder_that_was_there_already_is_not_believed(machine: Machine) -> None:
    bundle = machine.bundle
    machine.pin(digest_of_bundle(bundle))
    machine.run(bundle)
    machine.mark.unlink()
    sys.modules.pop(machine.name)
    (machine.installed[0] / f"{machine.name}.py").write_text("raise SystemExit('another')")
    with pytest.raises(PolicyError, match=f"{machine.name}.py' is not the bundle's"):
        machine.run(bundle)
    (machine.installed[0] / f"{machine.name}.py").write_text(machine.files[f"{machine.name}.py"])
    (machine.installed[0] / "sitecustomize.py").write_text("")
    with pytest.raises(PolicyError, match="sitecustomize"):
        machine.run(bundle)
    assert not machine.mark.exists()


def test_compiled_files_in_the_installed_folder_are_not_read(machine: Machine) -> None:
    bundle = machine.bundle
    machine.pin(digest_of_bundle(bundle))
    machine.run(bundle)
    stale = machine.installed[0] / "__pycache__" / f"{machine.name}.cpython-311.pyc"
    stale.parent.mkdir(exist_ok=True)
    stale.write_bytes(b"not what was reviewed")
    sys.modules.pop(machine.name)
    machine.run(bundle)
    assert not stale.exists() or stale.read_bytes() != b"not what was reviewed"


def test_the_run_cannot_name_another_folder(machine: Machine, tmp_path: Path) -> None:
    """Flower takes folder and hash from the run, which the server writes."""
    bundle = machine.bundle
    machine.pin(digest_of_bundle(bundle))
    evil = tmp_path / "flower" / "apps" / "evil.00000000"
    evil.mkdir(parents=True)
    (evil / "pyproject.toml").write_text(PROJECT.format(n=f"evil{machine.number}"))
    (evil / f"client_evil{machine.number}.py").write_text("raise SystemExit('evil ran')")
    version = f"1.0.0.{'0' * 8}/../evil"
    from flwr.common.config import get_project_dir

    (tmp_path / "flower/apps/tests.tinyapp.1.0.0.00000000").mkdir()
    assert get_project_dir("tests/tinyapp", version, "0" * 64).resolve() == evil  # Flower's own
    app = machine.run(bundle, run=("tests/tinyapp", version, "0" * 64))
    assert type(app).__name__ == "ClientApp"
    assert machine.mark.exists()


@pytest.mark.parametrize("kind", [name for name in COMMANDS if name != CLIENT_APP])
def test_only_client_apps_run(machine: Machine, kind: str) -> None:
    machine.pin(digest_of_bundle(machine.bundle))
    with pytest.raises(PolicyError, match=f"{kind}: only ClientApps run here"):
        machine.run(machine.bundle, kind)
    assert machine.installed == []


def test_nothing_loads_that_was_not_verified(machine: Machine) -> None:
    with pytest.raises(PolicyError, match="no app was verified"):
        Guard(machine.policy).load()


@pytest.mark.parametrize("lost", ["pull_task_input", "install_from_fab", "get_load_client_app_fn"])
def test_a_flower_without_the_seam_is_refused(machine: Machine, lost: str) -> None:
    module = types.ModuleType("other flower")
    vars(module).update(vars(importlib.import_module(MODULE)))
    names = ("pull_task_input", "install_from_fab", "get_load_client_app_fn")
    body = "\n    ".join(f"{name}()" for name in names if name != lost)
    scope: dict[str, Any] = {}
    code = compile(f"def run_clientapp():\n    {body}", "flower", "exec")
    types.FunctionType(code, scope)()
    vars(module)["run_clientapp"] = scope["run_clientapp"]
    with pytest.raises(RunError, match=f"does not call {lost}"):
        Guard(machine.policy).attach(module)


def test_the_installed_flower_has_the_seam() -> None:
    real = importlib.import_module(MODULE)
    before = dict(vars(real))
    check_flower()
    assert vars(real) == before  # a look changes nothing


@pytest.mark.parametrize("reviewed", [True, False])
def test_flowers_own_process_answers_for_the_guard(
    machine: Machine, reviewed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of ``run_clientapp`` but its connection: what reaches the server is a reply."""
    from flwr.app import Context, Message, RecordDict
    from flwr.supercore.fab import Fab
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_run_id", "_node_id", "_task_id"):  # Flower sets them with the task's input
        monkeypatch.setattr(TaskIdentity, name, 1)
    bundle = machine.bundle
    digest = digest_of_bundle(bundle)
    machine.pin(digest if reviewed else "a" * 64)
    real = importlib.import_module(MODULE)
    message = Message(RecordDict(), dst_node_id=7, message_type="query")
    context = Context(1, 7, {}, RecordDict(), {})
    run = Run.create_empty(1)
    run.fab_id, run.fab_version = "tests/tinyapp", "../../evil"
    sent: list[Message] = []
    played = {
        "pull_task_input": lambda client: (message, context, run, Fab("0" * 64, bundle, {})),
        "push_message": lambda client, reply, context: sent.append(reply),
        "push_task_output": lambda **given: None,
        "register_signal_handlers": lambda **given: None,
        "event": lambda *given: None,
        "HeartbeatSender": lambda function: types.SimpleNamespace(start=lambda: None),
        "flwr_exit": lambda **given: None,
        # Replaced by the guard; named here so that they are put back.
        "install_from_fab": real.install_from_fab,
        "get_load_client_app_fn": real.get_load_client_app_fn,
    }
    for name, value in played.items():
        monkeypatch.setattr(real, name, value)
    Guard(machine.policy).attach(real)

    real.run_clientapp("127.0.0.1:1", "token", insecure=True)

    (reply,) = sent
    assert reply.has_error()  # the reviewed app has no handler of queries
    assert machine.mark.exists() == reviewed
    told = f"asked '{digest}', must be {'a' * 64}"
    assert (told in reply.error.reason) != reviewed


# ---- what a digest covers ----------------------------------------------------------------------

NAMES = st.sampled_from(["a.py", "b/c.py", "b/__pycache__/c.cpython-311.pyc", "x/.info/y.py"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(NAMES, st.binary(max_size=8), min_size=1), NAMES, st.binary(max_size=8))
def test_two_bundles_have_one_digest_only_if_they_install_the_same(
    files: dict[str, bytes], name: str, content: bytes
) -> None:
    def packed(entries: dict[str, bytes], manifest: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for key, value in {**entries, ".info/CONTENT": manifest}.items():
                archive.writestr(key, value)
        return buffer.getvalue()

    other = {**files, name: content}
    first, second = packed(files, b"1"), packed(other, b"2")
    assert files_of_bundle(first) == files
    assert (digest_of_bundle(first) == digest_of_bundle(second)) == (files == other)


@pytest.mark.parametrize("name", ["/etc/x.py", "../x.py", "a/../../x.py", "./a.py", "a//b.py"])
def test_a_bundle_with_odd_paths_is_none(name: str) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "x")
    with pytest.raises(ConfigError, match="must be relative, plain and there once"):
        digest_of_bundle(buffer.getvalue())


def test_a_name_that_is_there_twice_is_refused() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.py", "reviewed")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.py", "another")
    with pytest.raises(ConfigError, match="there once"):
        digest_of_bundle(buffer.getvalue())


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_but_a_bundle_pass(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    policy = tmp_path_factory.mktemp("p") / "owner.toml"
    policy.write_text(f'[app]\ndigest = "{"a" * 64}"\n')
    policy.chmod(0o600)
    with pytest.raises(PolicyError, match=r"app\.digest"):
        verify_bundle(data, policy)


# ---- how it is put in place --------------------------------------------------------------------


def test_every_command_of_flowers_superexec_is_the_guard(tmp_path: Path) -> None:
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND

    assert set(TASK_TYPE_TO_COMMAND.values()) <= set(COMMANDS)
    shims = make_shims(tmp_path / "commands")
    assert {p.name for p in shims.iterdir()} == set(COMMANDS)
    for path in shims.iterdir():
        assert f"-m fedsplit.deploy.guard {path.name} " in path.read_text()
        assert os.access(path, os.X_OK)


def test_the_guard_as_a_process(tmp_path: Path) -> None:
    """It refuses to install dependencies, and understands Flower's arguments."""
    command = [str(make_shims(tmp_path / "commands") / CLIENT_APP)]
    env = {**os.environ, "PATH": "", "FEDSPLIT_OWNER_PATH": os.environ["PATH"]}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments], env=env, capture_output=True, text=True, timeout=60, check=False
        )

    refused = run("--token", "x", "--insecure", "--allow-runtime-dependency-installation")
    assert refused.returncode != 0
    assert "installs nothing at run time" in refused.stderr
    told = run("--help")
    assert told.returncode == 0
    assert "--runtime-api-address" in told.stdout


def test_a_machine_that_says_it_is_a_simulation_is_refused(tmp_path: Path) -> None:
    from fedsplit.deploy.node import NodeFile

    node = NodeFile(tmp_path, "localhost:1", tmp_path, tmp_path, tmp_path / "home")
    with pytest.raises(ConfigError, match="FEDSPLIT_SIMULATION='1'"):
        owner_environment(node, tmp_path, tmp_path, {"FEDSPLIT_SIMULATION": "1"})
    env = owner_environment(
        node, tmp_path / "owner.toml", tmp_path, {"FLWR_HOME": "/x", "FEDSPLIT_HOME": "/y"}
    )
    assert env["FLWR_HOME"] == str(tmp_path)
    assert env["FEDSPLIT_HOME"] == str(tmp_path / "home")
    assert env["FEDSPLIT_POLICY"] == str(tmp_path / "owner.toml")


def test_superexec_ends_with_the_supernode_and_proves_itself(tmp_path: Path) -> None:
    command = superexec_command(4711, tmp_path / "secret", 99)
    assert command[command.index("--parent-pid") + 1] == "99"
    assert command[command.index("--superexec-auth-secret-file") + 1] == str(tmp_path / "secret")
    assert "--allow-runtime-dependency-installation" not in command
