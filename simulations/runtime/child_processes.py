"""Child processes: each in its own session, its output in a log file and in a queue."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fedsplit.errors import RunError
from simulations.runtime import watchdog

TAIL_LINES = 20
ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
# What Ray appends below its folder: /ray/session_<date>_<time>_<microseconds>_<pid>/sockets/...
RAY_SOCKET_LENGTH = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
MAX_SOCKET_LENGTH = 103 if sys.platform == "darwin" else 107


@dataclass(frozen=True)
class LogLine:
    """One line that a component wrote, without colours and line end."""

    component: str
    text: str


Router = Callable[[str], LogLine | None]


def free_port() -> int:
    """Return a TCP port of the loopback interface that is free now.

    Somebody else may take it before it is used: callers must treat "address in use" as a reason to
    ask again.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Child:
    """One process with its log; :meth:`stop` ends it and waits for the log to be complete."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        log_path: Path,
        lines: queue.SimpleQueue[LogLine] | None = None,
        route: Router | None = None,
        logs: Mapping[str, Path] | None = None,
    ) -> None:
        """Start ``argv``.

        Args:
            name: the component's name in errors, and of its lines.
            argv: command and arguments.
            env: the whole environment.
            cwd: working directory.
            log_path: file to which its lines are appended.
            lines: queue that gets each line.
            route: names a line's component (None: the file alone gets it); by default ``name``.
            logs: files for the lines of other components than ``name``.

        Raises:
            RunError: if it cannot be started.
        """
        self.name = name
        self.log_path = log_path
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._lines = lines
        self._route = route or (lambda text: LogLine(name, text))
        self._logs = {name: log_path, **(logs or {})}
        try:
            self.process = subprocess.Popen(
                list(argv),
                env=dict(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise RunError(f"{name}: cannot start {argv[0]}: {error}") from error
        self._pump = threading.Thread(target=self._copy, name=f"log of {name}", daemon=True)
        self._pump.start()

    def _copy(self) -> None:
        stream = self.process.stdout
        assert stream is not None
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            files: dict[str, IO[str]] = {}
            for raw in stream:
                text = ANSI.sub("", raw.decode("utf-8", "replace")).rstrip("\r\n")
                line = self._route(text)
                component = line.component if line else self.name
                with contextlib.suppress(OSError):  # disk full: keep reading, or the child blocks
                    if component not in files:
                        path = self._logs.get(component, self.log_path)
                        opened = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
                        files[component] = stack.enter_context(opened)
                    files[component].write(text + "\n")
                if line is not None:
                    if text.strip():
                        self.tail.append(text)
                    if self._lines is not None:
                        self._lines.put(line)

    @property
    def alive(self) -> bool:
        """Whether the process is running."""
        return self.process.poll() is None

    def finish_log(self, timeout_s: float = 2.0) -> None:
        """Wait until all it wrote is in the log (a grandchild may hold the pipe open: bounded)."""
        self._pump.join(timeout_s)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its process group, if it is there."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def stop(self, grace_s: float = 3.0) -> None:
        """Ask it to end, then make it: SIGTERM, ``grace_s`` seconds later SIGKILL."""
        if self.alive:
            self.signal(signal.SIGTERM)
            try:
                self.process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.signal(signal.SIGKILL)
                self.process.wait()
        self.finish_log(0.5)

    def failure(self, what: str) -> RunError:
        """Return the error that says ``what`` happened to it and how its log ends."""
        self.finish_log(0.5)
        code = self.process.poll()
        state = "running" if code is None else f"exit code {code}"
        return RunError(
            f"{self.name}: {what} ({state}); log: {self.log_path}\n{tail_text(self.tail)}"
        )


def tail_text(lines: Sequence[str] | deque[str]) -> str:
    """Return the last lines, indented, for an error message."""
    last = list(lines)[-TAIL_LINES:]
    return "\n".join(f"  | {line}" for line in last) or "  | (it wrote nothing)"


def is_port_taken(child: Child) -> bool:
    """Return whether ``child`` ended because somebody took its port before it did."""
    return not child.alive and any("address already in use" in x.lower() for x in child.tail)


class ProcessGroup:
    """Owns the processes and temporary folders of one runtime and leaves nothing behind.

    Every child carries the runtime's mark in its environment (see :mod:`.watchdog`).  A watchdog
    process ends them all even if this process is killed with SIGKILL.
    """

    def __init__(self, parent: Path | None = None) -> None:
        """Make the folders; nothing is started yet.

        Args:
            parent: where the temporary folder is made; None is the system's.  Ray's sockets go to
                the system's if ``parent`` is too deep: a Unix socket's path is at most 107 bytes.
        """
        self.mark = secrets.token_hex(12)
        self.children: list[Child] = []
        self._watchdog: subprocess.Popen[bytes] | None = None
        short = Path("/tmp") if os.path.isdir("/tmp") else Path(tempfile.gettempdir())
        self.root = Path(tempfile.mkdtemp(prefix="fedsplit-", dir=parent or short)).resolve()
        self.folders = [self.root]
        self.ray_root = self.root
        if len(os.fsencode(self.root)) + RAY_SOCKET_LENGTH > MAX_SOCKET_LENGTH:
            self.ray_root = Path(tempfile.mkdtemp(prefix="fedsplit-", dir=short)).resolve()
            self.folders.append(self.ray_root)

    def folder(self, *names: str) -> Path:
        """Return a folder below the root, made with mode 0700."""
        path = self.root.joinpath(*names)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    def watch(self) -> None:
        """Start the watchdog."""
        env = {key: value for key, value in os.environ.items() if key != watchdog.MARK_VARIABLE}
        self._watchdog = subprocess.Popen(
            [sys.executable, "-P", watchdog.__file__, self.mark, *map(str, self.folders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=env,
            start_new_session=True,
        )

    def add(self, child: Child) -> Child:
        """Own ``child``."""
        self.children.append(child)
        return child

    def close(self) -> None:
        """End all processes (last started first), then remove the folders."""
        try:
            for child in self.children:
                child.signal(signal.SIGTERM)
            for child in reversed(self.children):
                child.stop()
            watchdog.end_marked(self.mark, str(self.root))
        finally:
            for folder in self.folders:
                shutil.rmtree(folder, ignore_errors=True)
            if self._watchdog is not None:
                assert self._watchdog.stdin is not None
                with contextlib.suppress(OSError):
                    self._watchdog.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._watchdog.wait(10)
                self._watchdog = None


def wait_until(ready: Callable[[], bool], timeout_s: float, step_s: float = 0.05) -> bool:
    """Call ``ready`` every ``step_s`` seconds; return whether it was true within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if ready():
            return True
        time.sleep(step_s)
    return ready()


def answers(url: str, ca: Path | None) -> bool:
    """Return whether a GET of ``url`` succeeds, past any proxy, trusting ``ca`` alone."""
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if ca is not None:
        context = ssl.create_default_context(cafile=str(ca))
        handlers.append(urllib.request.HTTPSHandler(context=context))
    try:
        with urllib.request.build_opener(*handlers).open(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:  # URLError is one
        return False
