"""What simulation and deployment share: one SuperLink, and Flower apps submitted to it."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from fedsplit.deploy.flower_commands import find_command
from fedsplit.errors import RunError, check
from simulations.runtime.certificates import Certificates
from simulations.runtime.child_processes import (
    Child,
    LogLine,
    answers,
    free_port,
    is_port_taken,
    tail_text,
    wait_until,
)
from simulations.runtime.launcher import Launcher, OnLine
from simulations.runtime.submission import (
    FlowerRun,
    Scalar,
    app_processes,
    check_run_config,
    end_tree,
    flwr_json,
    route_app_line,
    started_run,
)
from simulations.runtime.watchdog import lives

CONNECTION = "own"
START_TIMEOUT_S = 90.0
START_ATTEMPTS = 3
VANISHED_AFTER_S = 8.0
POLL_S = 5.0
ACCESS_LOG = "[uvicorn.access]"


class Federation(Launcher):
    """A SuperLink of its own, and what belongs to it."""

    def __init__(
        self,
        log_dir: Path,
        env: Mapping[str, str] | None,
        server_threads: int | None,
        client_threads: int | None,
    ) -> None:
        """Check the parameters; nothing is started before ``with``."""
        super().__init__(log_dir, env, server_threads, client_threads)
        self.address = ""
        self._superlink: Child | None = None

    # What the two modes fill in.

    @abstractmethod
    def _submission(self) -> list[str]:
        """Return the arguments of ``flwr run`` that describe the federation."""

    def _workers(self) -> list[Child]:
        """Return the processes besides the SuperLink whose end matters to a run."""
        return []

    # Building blocks.

    def _start_superlink(
        self, arguments: list[str], more: Mapping[str, str], tls: Certificates | None
    ) -> None:
        """Start the SuperLink on a free port; wait until it answers; write the CLI's connection."""
        for attempt in range(START_ATTEMPTS):
            port = free_port()
            self.address = f"127.0.0.1:{port}"
            command = [find_command("flower-superlink"), "--host", "127.0.0.1", "--port", str(port)]
            self._superlink = self._spawn(
                "superlink",
                [*command, "--disable-runtime-dependency-installation", *arguments],
                more,
                route=lambda text: None if ACCESS_LOG in text else LogLine("superlink", text),
            )
            if self._answers(self._superlink, tls):
                break
            if not is_port_taken(self._superlink) or attempt == START_ATTEMPTS - 1:
                raise self._superlink.failure(f"did not start within {START_TIMEOUT_S:.0f} s")
        trust = {"insecure": True} if tls is None else {"root-certificates": str(tls.ca)}
        connection = {"address": self.address, **trust}
        text = tomli_w.dumps({"superlink": {"default": CONNECTION, CONNECTION: connection}})
        (self.processes.folder("home", "cli") / "config.toml").write_text(text, encoding="utf-8")

    def _answers(self, superlink: Child, tls: Certificates | None) -> bool:
        """Wait until the SuperLink answers; return whether it does."""
        url = f"{'http' if tls is None else 'https'}://{self.address}/health"
        ca = None if tls is None else tls.ca
        wait_until(lambda: not superlink.alive or answers(url, ca), START_TIMEOUT_S)
        if not superlink.alive:
            superlink.finish_log(1.0)
        return superlink.alive and answers(url, ca)

    def _flwr(self, *arguments: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """Run one of Flower's CLI commands against this SuperLink (see :func:`flwr_json`)."""
        env, cwd = self._environment("cli"), self.processes.folder("cwd", "cli")
        return flwr_json(arguments, env=env, cwd=cwd, timeout_s=timeout_s)

    # Running an app.

    def run(
        self,
        app_dir: Path,
        run_config: Mapping[str, Scalar] | None = None,
        *,
        timeout_s: float | None = None,
        on_line: OnLine | None = None,
    ) -> FlowerRun:
        """Run the Flower app in ``app_dir`` and return when it has ended.

        Args:
            app_dir: folder with the app's pyproject.toml; bundled and sent as ``flwr run`` does.
            run_config: values for keys that the app declares (dotted when nested).
            timeout_s: seconds after which the run is stopped; None waits for ever.
            on_line: called in this thread with each line as it arrives: components ``serverapp``,
                ``clientapp`` (simulation), ``superlink``, ``supernode-<i>``.  What it raises ends
                the call.

        Raises:
            ConfigError: if the app or the config is not valid.
            RunError: if the run fails, is stopped or takes too long, or a process of the runtime
                dies; names the component, its log and the log's last lines.  Start a new federation
                for the next attempt: this one may still be busy with the run that failed.
        """
        check(timeout_s is None or timeout_s > 0, "timeout_s", timeout_s, "> 0, or None")
        app_dir = Path(app_dir).absolute()
        run_config = dict(run_config or {})
        check_run_config(app_dir, run_config)
        arguments = [find_command("flwr"), "run", str(app_dir), CONNECTION, "--stream"]
        if run_config:
            config_file = self.processes.folder("run-config") / f"{time.monotonic_ns()}.toml"
            config_file.write_text(tomli_w.dumps(run_config), encoding="utf-8")
            arguments += ["-c", str(config_file)]
        began = time.monotonic()
        stream = self._spawn(
            "serverapp",
            arguments + self._submission(),
            home="cli",
            route=route_app_line,
            logs={"clientapp": self.log_dir / "clientapps.log"},
        )
        try:
            deadline = None if timeout_s is None else began + timeout_s
            run_id = self._follow(stream, deadline, on_line)
            row = self._last_word(stream, run_id, deadline)
        except Exception:
            self._give_up()
            raise
        finally:
            stream.stop(grace_s=0.5)
        return self._verdict(stream, row, time.monotonic() - began)

    def _follow(self, stream: Child, deadline: float | None, on_line: OnLine | None) -> int | None:
        """Pass lines on until the stream ends; return the run's number.

        Raises:
            RunError: at the deadline, or when the SuperLink or the app's process dies.
        """
        run_id: int | None = None
        apps: set[psutil.Process] = set()
        looked = lived = time.monotonic()
        assert self._superlink is not None
        while True:
            ended = not stream.alive
            if ended:
                stream.finish_log()
            while (line := self._next_line(0.0 if ended else 0.1)) is not None:
                if run_id is None and line.component == stream.name:
                    run_id = started_run(line.text)
                if on_line is not None:
                    on_line(line)
                if deadline is not None and time.monotonic() > deadline:
                    break
            now = time.monotonic()
            if ended:
                return run_id
            if deadline is not None and now > deadline:
                raise stream.failure(f"run {run_id} did not end in time and was stopped")
            if not self._superlink.alive:
                raise self._superlink.failure("ended during the run")
            if now - looked > 1.0:
                looked = now
                apps |= app_processes(self._superlink.process.pid)
                if not apps or any(lives(process) for process in apps):
                    lived = now
                elif now - lived > VANISHED_AFTER_S:  # Flower itself notices after a minute
                    raise stream.failure("the app's process is gone: killed, or out of memory?")

    def _give_up(self) -> None:
        """End the processes of the run that was submitted; the SuperLink marks it as failed."""
        if self._superlink is not None:
            for process in app_processes(self._superlink.process.pid):
                end_tree(process)

    def _last_word(
        self, stream: Child, run_id: int | None, deadline: float | None
    ) -> dict[str, Any]:
        """Return what Flower says of the run: the exit code of ``flwr run --stream`` does not.

        The stream ends when the run does.  Should it break earlier, the run is waited for.
        """
        if run_id is None:
            raise stream.failure("the app was not accepted")
        while True:
            row: dict[str, Any]
            row = self._flwr("ls", CONNECTION, "--run-id", str(run_id))["runs"][0]
            if str(row["status"]).startswith("finished"):
                return row
            if deadline is not None and time.monotonic() > deadline:
                raise stream.failure(f"run {run_id} did not end in time and was stopped")
            time.sleep(POLL_S)

    def _verdict(self, stream: Child, row: dict[str, Any], duration_s: float) -> FlowerRun:
        """Turn the run's row into the result, or raise."""
        run_id, status = int(row["run-id"]), str(row["status"])
        details = "" if row["status-details"] == "N/A" else str(row["status-details"])
        run = FlowerRun(run_id, status, duration_s, details, row)
        if status == "finished:completed":
            return run
        self._keep_ray_logs()
        dead = [child.name for child in self._workers() if not child.alive]
        more = f"; no longer running: {', '.join(dead)}" if dead else ""
        raise RunError(
            f"{stream.name}: run {run_id} is {status} after {duration_s:.1f} s: "
            f"{details or 'no details'}{more}; log: {stream.log_path}\n{tail_text(stream.tail)}"
        )
