"""What every runtime shares: processes of its own that start and end with a ``with`` statement."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, Self

import fedsplit
from fedsplit.errors import RunError, check
from simulations.runtime.certificates import Certificates, make_certificates
from simulations.runtime.child_processes import Child, LogLine, ProcessGroup, Router
from simulations.runtime.environment import base_environment

OnLine = Callable[[LogLine], None]

LOG_NAMES = ("superlink.log", "serverapp.log", "clientapps.log", "supernode-*.log")


class Launcher(ABC):
    """Processes that belong to one runtime; a context manager.

    Entering starts them, leaving (normally, by an exception, by Ctrl-C or SIGTERM) ends every
    process that was started and removes the temporary folders.  Logs stay in ``log_dir``.
    """

    def __init__(
        self,
        log_dir: Path,
        env: Mapping[str, str] | None,
        server_threads: int | None,
        client_threads: int | None,
    ) -> None:
        """Check the parameters; nothing is started before ``with``."""
        for name, value in (("server_threads", server_threads), ("client_threads", client_threads)):
            check(value is None or value >= 1, name, value, ">= 1, or None for no bound")
        self.log_dir = Path(log_dir).absolute()
        self.server_threads = server_threads
        self.client_threads = client_threads
        self._extra_env = dict(env or {})
        self._lines: queue.SimpleQueue[LogLine] = queue.SimpleQueue()
        self._processes: ProcessGroup | None = None
        self._python_path: list[str] = []
        self._old_sigterm: Any = None

    # Life cycle.

    def __enter__(self) -> Self:
        """Start everything.

        Raises:
            RunError: if a process does not come up; nothing is left running.
        """
        self.log_dir.mkdir(parents=True, exist_ok=True)
        for pattern in LOG_NAMES:
            for old in self.log_dir.glob(pattern):
                old.unlink()
        self._processes = ProcessGroup()
        try:
            self._catch_sigterm()
            self._processes.watch()
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End everything."""
        self.stop()

    def stop(self) -> None:
        """End every process of this runtime; harmless when called again."""
        processes, self._processes = self._processes, None
        self.__dict__.pop("certificates", None)
        try:
            if processes is not None:
                processes.close()
        finally:
            if self._old_sigterm is not None:
                signal.signal(signal.SIGTERM, self._old_sigterm)
                self._old_sigterm = None

    def _catch_sigterm(self) -> None:
        """Let SIGTERM unwind the stack, unless the program handles it already."""
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return

        def unwind(number: int, frame: FrameType | None) -> None:
            raise SystemExit(128 + number)

        self._old_sigterm = signal.signal(signal.SIGTERM, unwind)

    @property
    def processes(self) -> ProcessGroup:
        """The processes of this runtime.

        Raises:
            RunError: outside the ``with`` block.
        """
        if self._processes is None:
            raise RunError(f"{type(self).__name__}: not running; use it in a with statement")
        return self._processes

    @cached_property
    def certificates(self) -> Certificates:
        """Certificates for localhost that live as long as the runtime; made when first asked for.

        A deployment's SuperLink uses them; a session server of our own can, in either mode.
        """
        return make_certificates(self.processes.folder("tls"))

    @abstractmethod
    def _start(self) -> None:
        """Start the processes, and return when they are ready."""

    # Building blocks.

    def _environment(self, home: str, more: Mapping[str, str] | None = None) -> dict[str, str]:
        env = base_environment(self.processes.mark, {**(more or {}), **self._extra_env})
        # The children run in folders of their own, and must find the very copy that launches them.
        given = [os.path.abspath(x) for x in env.get("PYTHONPATH", "").split(os.pathsep) if x]
        checkout = str(Path(fedsplit.__file__).resolve().parent.parent)
        env["PYTHONPATH"] = os.pathsep.join([*given, *self._python_path, checkout])
        return env | {"FLWR_HOME": str(self.processes.folder("home", home))}

    def _spawn(
        self,
        name: str,
        argv: Sequence[str],
        more: Mapping[str, str] | None = None,
        *,
        home: str = "",
        route: Router | None = None,
        logs: Mapping[str, Path] | None = None,
    ) -> Child:
        """Start a component in a home and a working directory of its own (``home``: another's)."""
        child = Child(
            name,
            argv,
            env=self._environment(home or name, more),
            cwd=self.processes.folder("cwd", home or name),
            log_path=self.log_dir / f"{name}.log",
            lines=self._lines,
            route=route,
            logs=logs,
        )
        return self.processes.add(child)

    def _next_line(self, timeout_s: float) -> LogLine | None:
        with contextlib.suppress(queue.Empty):
            return self._lines.get(timeout=timeout_s) if timeout_s else self._lines.get_nowait()
        return None

    def _keep_ray_logs(self) -> None:
        """Copy the small Ray logs of a failed run beside ours: they die with the temp folder."""
        for source in self.processes.ray_root.glob("ray/session_latest/logs/*"):
            if source.suffix in (".out", ".err") and 0 < source.stat().st_size < 2**20:
                target = self.log_dir / "ray"
                with contextlib.suppress(OSError):  # a full disk: why the run failed is told next
                    target.mkdir(exist_ok=True)
                    shutil.copy(source, target / source.name)
