"""A SuperNode on an owner's machine whose apps pass :mod:`fedsplit.deploy.guard` before they run.

Two of Flower's own processes, neither of which runs an app's code:

- ``flower-supernode --isolation process``: talks to the SuperLink, holds messages and bundles in
  memory and starts nothing;
- ``flower-superexec``: asks the SuperNode for tasks and starts a command for each, *by name*.  Its
  PATH is one folder in which every such name is the guard.

A secret drawn at each start lets only this SuperExec ask the SuperNode for tasks.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from fedsplit import storage
from fedsplit.deploy.flower_commands import find_command
from fedsplit.deploy.guard import CLIENT_APP, PATH_VARIABLE
from fedsplit.deploy.node import NodeFile, node_config_text
from fedsplit.errors import ConfigError
from fedsplit.owners.naming import HOME_VARIABLE, POLICY_VARIABLE, SIMULATION_VARIABLE

# Every command that a SuperExec may start (flwr 1.41, 1.42); one that is not here is not found.
COMMANDS = (
    CLIENT_APP,
    "flwr-serverapp",
    "flwr-simulation",
    "flwr-agentapp",
    "flwr-model",
    "flwr-connector",
)
GRACE_S = 10.0
_POLL_S = 0.2
_PR_SET_PDEATHSIG = 1
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def pinned_digest(policy: Path) -> str:
    """Return the digest that a policy pins; a process of its own reads the policy.

    Raises:
        ConfigError: the policy cannot be used, or pins none.
    """
    command = [sys.executable, "-P", "-m", "fedsplit.owners.policy.pinned_digest", str(policy)]
    found = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if found.returncode:
        raise ConfigError(found.stderr.strip() or f"policy {policy}: must be readable")
    pinned = found.stdout.strip()
    if not pinned:
        raise ConfigError(
            f"{policy}: app.digest: must be set, or the server's app runs unreviewed "
            "(fedsplit owner digest prints it)"
        )
    return pinned


@contextmanager
def sole(home: Path) -> Iterator[Path]:
    """Hold an owner's home for one SuperNode; yield its folder for Flower's state.

    Raises:
        ConfigError: another one runs on this home, or it cannot be written.
    """
    flower = home / "flower"
    lock = storage.FileLock(flower / "lock", wait_s=0)
    try:
        for folder in (home, flower):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        flower.chmod(0o700)
        lock.acquire()
    except BlockingIOError:
        raise ConfigError(f"home {home}: a SuperNode runs on it already") from None
    except OSError as error:
        raise ConfigError(f"home {home}: must be a writable folder: {error}") from None
    try:
        yield flower
    finally:
        lock.release()


def make_shims(folder: Path) -> Path:
    """Write the folder that is SuperExec's whole PATH: every command in it is the guard."""
    folder.mkdir(mode=0o700)
    python = shlex.quote(sys.executable)
    for name in COMMANDS:
        text = f'#!/bin/sh\nexec {python} -P -m fedsplit.deploy.guard {name} "$@"\n'
        storage.create(folder / name, text.encode(), 0o700)
    return folder


def owner_environment(
    node: NodeFile, policy: Path, flower: Path, base: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment of the owner's processes.

    Raises:
        ConfigError: the machine says that it is a simulation's, where noise follows a known seed.
    """
    if base.get(SIMULATION_VARIABLE):
        raise ConfigError(
            f"{SIMULATION_VARIABLE}={base[SIMULATION_VARIABLE]!r}: must not be set on an owner's "
            "machine: noise would follow the run's seed"
        )
    kept = {k: v for k, v in base.items() if not k.startswith("FLWR_") or k in _QUIET}
    # What an owner's process prints must not depend on the locale
    kept |= {"PYTHONIOENCODING": "utf-8"}
    tuned = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}  # a second per message otherwise
    ours = {
        "FLWR_HOME": str(flower),
        HOME_VARIABLE: str(node.home),
        POLICY_VARIABLE: str(policy.absolute()),
    }
    return {**_QUIET, **tuned, **kept, **ours}


def supernode_command(node: NodeFile, policy: Path, port: int, secret: Path) -> list[str]:
    """Return the command line of the SuperNode."""
    return [
        find_command("flower-supernode"),
        *("--superlink", node.superlink),
        *("--root-certificates", str(node.ca)),
        *("--auth-supernode-private-key", str(node.key)),
        *("--node-config", node_config_text(node.node_config(policy))),
        *("--isolation", "process"),
        *("--superexec-auth-secret-file", str(secret)),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]


def superexec_command(port: int, secret: Path, parent: int) -> list[str]:
    """Return the command line of the SuperExec; it ends with process ``parent``."""
    return [
        find_command("flower-superexec"),
        *("--insecure", "--runtime-api-address", f"127.0.0.1:{port}"),
        *("--superexec-auth-secret-file", str(secret)),
        *("--parent-pid", str(parent)),
    ]


def start(node: NodeFile, policy: Path) -> int:
    """Run an owner's SuperNode until it ends or this process is told to end.

    Returns:
        An exit code: 0 after SIGTERM or Ctrl-C, else that of what ended by itself, never 0.

    Raises:
        ConfigError: the policy pins no digest, or the home is in use.
        RunError: Flower is not installed.
    """
    with sole(node.home) as flower:
        pinned_digest(policy)
        runtime = flower / "runtime"
        shutil.rmtree(runtime, ignore_errors=True)
        runtime.mkdir(mode=0o700)
        secret = runtime / "superexec.secret"
        storage.create(secret, secrets.token_bytes(32), 0o600)
        shims = make_shims(runtime / "commands")
        env = owner_environment(node, policy, flower, os.environ)
        port = node.port or _free_port()
        cwd = runtime / "cwd"
        cwd.mkdir(mode=0o700)
        guarded = {**env, "PATH": str(shims), PATH_VARIABLE: env.get("PATH", os.defpath)}
        children: list[subprocess.Popen[bytes]] = []
        try:
            with _told_to_end() as told:
                command = supernode_command(node, policy, port, secret)
                children.append(_child(command, env, cwd))
                command = superexec_command(port, secret, children[0].pid)
                children.append(_child(command, guarded, cwd))
                while not told and all(child.poll() is None for child in children):
                    time.sleep(_POLL_S)
                if told:
                    return 0
        finally:
            ended = [child.poll() for child in children]
            _end(children)
            shutil.rmtree(runtime, ignore_errors=True)
    return next((abs(code) for code in ended if code), 1)


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _child(command: list[str], env: Mapping[str, str], cwd: Path) -> subprocess.Popen[bytes]:
    # Should this process be killed, its children must not go on without it.
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def die_with_parent() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return subprocess.Popen(
        command, env=dict(env), cwd=cwd, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent
    )


@contextmanager
def _told_to_end() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in the yielded list."""
    told: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        told.append(number)

    before = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            with suppress(ProcessLookupError):
                child.terminate()
    until = time.monotonic() + GRACE_S
    for child in children:
        try:
            child.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
