"""The runtime's parts that need no Flower process."""

from __future__ import annotations

import datetime
import json
import math
import os
import queue
import shlex
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.common.config import parse_config_args

from fedsplit.deploy.flower_commands import find_command
from fedsplit.deploy.node import node_config_text
from fedsplit.errors import ConfigError, RunError
from simulations.runtime import Deployment, Simulation
from simulations.runtime.certificates import make_certificates, make_node_key
from simulations.runtime.child_processes import (
    MAX_SOCKET_LENGTH,
    RAY_SOCKET_LENGTH,
    Child,
    LogLine,
    ProcessGroup,
    free_port,
)
from simulations.runtime.environment import (
    THREAD_VARIABLES,
    base_environment,
    thread_environment,
)
from simulations.runtime.hooks import CLIENT_ENVIRONMENT_VARIABLE, FOLDER, RAY_HOOK
from simulations.runtime.hooks.fedsplit_ray_hook import add_client_environment
from simulations.runtime.machine import machine_cores
from simulations.runtime.submission import check_run_config, route_app_line
from simulations.runtime.watchdog import MARK_VARIABLE, end_marked, marked_processes

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]

# Ports and environment.


def test_free_port_can_be_bound_and_differs() -> None:
    ports = {free_port() for _ in range(8)}
    assert len(ports) > 1
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", ports.pop()))


def test_environment_is_neutral_and_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("FLWR_HOME", "/somewhere/shared")
    monkeypatch.setenv("NO_PROXY", "intranet")

    env = base_environment("abc", {"FLWR_LOG_LEVEL": "DEBUG"})

    assert "RAY_ADDRESS" not in env
    assert "FLWR_HOME" not in env
    assert env[MARK_VARIABLE] == "abc"
    assert env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert env["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert env["FLWR_LOG_LEVEL"] == "DEBUG"
    assert env["NO_PROXY"].startswith("intranet,127.0.0.1")


def test_flowers_commands_are_found_without_an_activated_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert os.access(find_command("flower-superlink"), os.X_OK)
    with pytest.raises(RunError, match="no-such-command: not found beside"):
        find_command("no-such-command")


def test_thread_budget_sets_every_library_and_stops_spinning() -> None:
    env = thread_environment(3)
    assert {env[name] for name in THREAD_VARIABLES} == {"3"}
    assert env["OMP_WAIT_POLICY"] == "PASSIVE"
    assert env["GOMP_SPINCOUNT"] == "0"
    assert not set(thread_environment(None)) & set(THREAD_VARIABLES)
    with pytest.raises(ConfigError, match="threads=0: must be >= 1"):
        thread_environment(0)


def test_ray_hook_adds_the_client_environment_for_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CLIENT_ENVIRONMENT_VARIABLE, json.dumps({"OMP_NUM_THREADS": "1"}))
    given_env = {"env_vars": {"PYTHONPATH": "x"}, "working_dir": None}
    assert add_client_environment(given_env) == {
        "env_vars": {"PYTHONPATH": "x", "OMP_NUM_THREADS": "1"},
        "working_dir": None,
    }
    assert given_env["env_vars"] == {"PYTHONPATH": "x"}
    assert add_client_environment(None) == {"env_vars": {"OMP_NUM_THREADS": "1"}}
    module, _, function = RAY_HOOK.rpartition(".")
    assert (Path(FOLDER) / f"{module}.py").is_file()
    assert function == add_client_environment.__name__


# What a federation accepts.


def test_simulation_counts_actors_that_can_be_used(tmp_path: Path) -> None:
    cores = machine_cores()
    engine = min(32, (os.cpu_count() or 1) + 4)
    half = Simulation(1000, cpus_per_client=0.5, log_dir=tmp_path)
    assert half.actors == min(2 * cores, engine)
    assert half.client_threads == 1
    assert Simulation(1000, cpus_per_client=0.001, log_dir=tmp_path).actors == engine
    assert Simulation(1, cpus_per_client=0.25, log_dir=tmp_path).actors == 1
    assert Simulation(9, cpus_per_client=float(cores), log_dir=tmp_path).client_threads == cores


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"supernodes": 0}, "supernodes=0: must be >= 1"),
        ({"cpus_per_client": 0.0}, r"cpus_per_client=0\.0: must be > 0"),
        ({"cpus_per_client": math.nan}, "cpus_per_client=nan"),
        ({"cpus_per_client": 1e6}, r"cpus_per_client=1000000\.0: must be <= \d+, the cores"),
        ({"gpus_per_client": -1.0}, r"gpus_per_client=-1\.0"),
        ({"server_threads": 0}, "server_threads=0"),
        ({"client_threads": -1}, "client_threads=-1"),
    ],
)
def test_simulation_refuses(tmp_path: Path, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Simulation(**{"supernodes": 2, "log_dir": tmp_path, **arguments})  # type: ignore[arg-type]


def test_deployment_configures_each_node(tmp_path: Path) -> None:
    deployment = Deployment(2, node_configs=[{"data": "a b"}, {}], log_dir=tmp_path)
    assert deployment.node_configs == [
        {"partition-id": 0, "num-partitions": 2, "data": "a b"},
        {"partition-id": 1, "num-partitions": 2},
    ]
    with pytest.raises(ConfigError, match=r"len\(node_configs\)=1: must be 2"):
        Deployment(2, node_configs=[{}], log_dir=tmp_path)
    with pytest.raises(ConfigError, match="supernodes=0"):
        Deployment(0, log_dir=tmp_path)


def test_node_config_survives_flowers_own_parser() -> None:
    config = {"path": '/data/with space/"q"\\x', "n": 3, "ok": True, "eps": 1e-06, "t": "a=b c=d"}
    assert parse_config_args([node_config_text(config)]) == config


@pytest.mark.parametrize("value", ["it's", "two\nlines", None, [1]])
def test_node_config_refuses_what_cannot_be_said(value: object) -> None:
    with pytest.raises(ConfigError, match="key="):
        node_config_text({"key": value})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="node config key='a b'"):
        node_config_text({"a b": 1})


def test_outside_its_with_block_a_federation_says_so(tmp_path: Path) -> None:
    write_app(tmp_path / "app")
    with pytest.raises(RunError, match="Simulation: not running"):
        Simulation(2, log_dir=tmp_path).run(tmp_path / "app")


# Run configs.


def write_app(folder: Path) -> Path:
    folder.mkdir()
    (folder / "pyproject.toml").write_text(
        "[tool.flwr.app]\npublisher='x'\n[tool.flwr.app.config]\nrounds=1\nnoise.eta=1.0\n"
    )
    return folder


def test_run_config_overrides_only_what_the_app_declares(tmp_path: Path) -> None:
    app = write_app(tmp_path / "app")
    check_run_config(app, {"rounds": 3, "noise.eta": 0.5})
    with pytest.raises(ConfigError, match=r"run_config\['eta'\]: must be .* noise\.eta, rounds"):
        check_run_config(app, {"eta": 0.5})
    with pytest.raises(ConfigError, match="rounds=None: must be a bool, int, float or str"):
        check_run_config(app, {"rounds": None})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="64-bit"):
        check_run_config(app, {"rounds": 2**63})
    with pytest.raises(ConfigError, match=r"app_dir=.*must hold a pyproject\.toml"):
        check_run_config(tmp_path, {})


@pytest.mark.parametrize(
    ("text", "component", "rest"),
    [
        ("INFO :  [ROUND 1/3]", "serverapp", "INFO :  [ROUND 1/3]"),
        ("(ClientAppActor pid=12) loss 0.5", "clientapp", "loss 0.5"),
        ("(ClientAppActor pid=12, ip=10.0.0.2) x (y)", "clientapp", "x (y)"),
        ("(pid=12) early", "clientapp", "early"),
        ("(a remark) of mine", "serverapp", "(a remark) of mine"),
        ("", "serverapp", ""),
    ],
)
def test_lines_of_actors_are_told_from_the_servers(text: str, component: str, rest: str) -> None:
    assert route_app_line(text) == LogLine(component, rest)


# Certificates.


def test_certificate_is_valid_for_loopback_only_and_by_its_ca(tmp_path: Path) -> None:
    made = make_certificates(tmp_path / "tls")
    other = make_certificates(tmp_path / "other")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(made.cert, made.key)

    def connect(ca: Path, name: str) -> str | None:
        client = ssl.create_default_context(cafile=str(ca))
        client.verify_flags |= ssl.VERIFY_X509_STRICT
        left, right = socket.socketpair()
        left.settimeout(5)
        right.settimeout(5)

        def serve() -> None:
            with right:
                try:
                    server.wrap_socket(right, server_side=True).close()
                except OSError:
                    return

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with left, client.wrap_socket(left, server_hostname=name) as wrapped:
                return wrapped.version()
        finally:
            thread.join()

    assert connect(made.ca, "localhost") == "TLSv1.3"
    assert connect(made.ca, "127.0.0.1") == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(made.ca, "example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(other.ca, "localhost")


def test_certificate_properties_and_file_modes(tmp_path: Path) -> None:
    made = make_certificates(tmp_path / "tls", hosts=["node.example", "10.0.0.7"], valid_days=2)
    certificate = x509.load_pem_x509_certificate(made.cert.read_bytes())
    ca = x509.load_pem_x509_certificate(made.ca.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value

    assert names.get_values_for_type(x509.DNSName) == ["node.example"]
    assert [str(x) for x in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    certificate.verify_directly_issued_by(ca)
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert 1.9 < left.total_seconds() / 86_400 <= 2
    assert certificate.not_valid_before_utc < datetime.datetime.now(datetime.UTC)
    modes = {x.name: stat.S_IMODE(x.stat().st_mode) for x in (tmp_path / "tls").iterdir()}
    assert modes == {"ca.pem": 0o644, "server.pem": 0o644, "server.key": 0o600}  # no CA key
    assert stat.S_IMODE((tmp_path / "tls").stat().st_mode) == 0o700
    with pytest.raises(FileExistsError):
        make_certificates(tmp_path / "tls")
    with pytest.raises(ConfigError, match="valid_days=0"):
        make_certificates(tmp_path / "x", valid_days=0)
    with pytest.raises(ConfigError, match="hosts"):
        make_certificates(tmp_path / "x", hosts=())


def test_node_key_is_what_flower_asks_for(tmp_path: Path) -> None:
    made = make_node_key(tmp_path / "keys", "node-0")
    private = load_ssh_private_key(made.private.read_bytes(), None)
    public = load_ssh_public_key(made.public.read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert private.curve.name == "secp384r1"
    assert private.public_key() == public
    assert stat.S_IMODE(made.private.stat().st_mode) == 0o600


# Children, marks and the watchdog.


def test_child_writes_its_log_and_names_itself_in_errors(tmp_path: Path) -> None:
    lines: queue.SimpleQueue[LogLine] = queue.SimpleQueue()
    code = "print('\\x1b[92mgreen\\x1b[0m'); print('b' * 100000); import sys; sys.exit('bad end')"
    child = Child(
        "part",
        [sys.executable, "-c", code],
        env=dict(os.environ),
        cwd=tmp_path,
        log_path=tmp_path / "part.log",
        lines=lines,
    )
    child.process.wait(60)
    child.finish_log()

    error = child.failure("went away")

    assert (tmp_path / "part.log").read_text().splitlines() == ["green", "b" * 100000, "bad end"]
    assert lines.get_nowait() == LogLine("part", "green")
    assert str(error).startswith("part: went away (exit code 1); log: ")
    assert str(error).endswith("  | bad end")


def test_command_that_cannot_start_is_a_run_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="part: cannot start /no/such/command"):
        Child("part", ["/no/such/command"], env={}, cwd=tmp_path, log_path=tmp_path / "log")


def test_marked_processes_are_found_wherever_they_went() -> None:
    mark = f"test-{os.getpid()}-{time.monotonic_ns()}"
    # The parent starts a grandchild in another session and ends: an orphan that ignores SIGTERM.
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {stubborn!r}], start_new_session=True)"  # noqa: E501
    subprocess.run(
        [sys.executable, "-c", parent], env={**os.environ, MARK_VARIABLE: mark}, check=True
    )
    (orphan,) = marked_processes(mark)

    ended = end_marked(mark, grace_s=0.3)

    assert ended == 1
    assert marked_processes(mark) == []
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE


def test_closing_a_process_group_leaves_neither_process_nor_folder(tmp_path: Path) -> None:
    processes = ProcessGroup(None)
    processes.watch()
    folder = processes.folder("cwd", "x")
    env = {**os.environ, MARK_VARIABLE: processes.mark}
    processes.add(Child("sleeper", SLEEP, env=env, cwd=folder, log_path=tmp_path / "log"))
    assert len(marked_processes(processes.mark)) == 1

    processes.close()

    assert marked_processes(processes.mark) == []
    assert not processes.root.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_when_the_launcher_is_killed_the_watchdog_cleans_up(
    tmp_path: Path, number: signal.Signals
) -> None:
    code = f"""
import os, sys, time
from pathlib import Path
from simulations.runtime.child_processes import Child, ProcessGroup
from simulations.runtime.watchdog import MARK_VARIABLE
processes = ProcessGroup(None)
processes.watch()
env = {{**os.environ, MARK_VARIABLE: processes.mark}}
log = Path({str(tmp_path)!r}) / "log"
processes.add(Child("s", {SLEEP!r}, env=env, cwd=processes.root, log_path=log))
print(processes.mark, processes.root, flush=True)
time.sleep(600)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env
    ) as launcher:
        assert launcher.stdout is not None
        mark, root = shlex.split(launcher.stdout.readline())
        assert len(marked_processes(mark)) == 1
        launcher.send_signal(number)
        launcher.wait(60)

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (marked_processes(mark) or Path(root).exists()):
        time.sleep(0.1)

    assert marked_processes(mark) == []
    assert not Path(root).exists()


def test_deep_work_folders_do_not_break_rays_sockets(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    processes = ProcessGroup(deep)
    try:
        assert processes.root.parent == deep
        assert len(str(processes.ray_root)) + RAY_SOCKET_LENGTH <= MAX_SOCKET_LENGTH
    finally:
        processes.close()
    assert not processes.ray_root.exists()
    assert list(deep.iterdir()) == []


def test_a_superlink_that_does_not_start_is_a_run_error_without_leftovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "flower-superlink"
    script.write_text("#!/bin/sh\necho no licence today\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(
        "simulations.runtime.federation.find_command", lambda name: str(tmp_path / name)
    )
    federation = Simulation(2, log_dir=tmp_path / "log")
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(RunError, match=r"superlink: .*exit code 3.*\n  \| no licence today"),
        federation,
    ):
        raise AssertionError("must not start")
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "log" / "superlink.log").read_text() == "no licence today\n"
