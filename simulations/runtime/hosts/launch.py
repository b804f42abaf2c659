"""Thousands of simulated owners: one process for the server, a few for all owners."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from fedsplit.config import RunConfig
from fedsplit.errors import check
from simulations.runtime.child_processes import Child
from simulations.runtime.environment import (
    RAY,
    RAY_AUTH_MODE,
    RAY_AUTH_TOKEN,
    RAY_AUTH_TOKEN_PATH,
    ray_credentials,
    thread_environment,
)
from simulations.runtime.launcher import Launcher, OnLine
from simulations.runtime.machine import machine_cores
from simulations.runtime.submission import route_app_line

MOST_AT_ONCE = 64  # sessions that may be opening at one server
SERVER = "simulations.runtime.hosts.server"


class HostedSimulation(Launcher):
    """A run whose owners live in a few hosts, processes that Ray starts here or on a cluster.

    Attributes:
        hosts: processes of owners on this machine; a cluster's nodes decide of theirs.
        address: of the cluster; empty: one of its own.
    """

    def __init__(
        self,
        owners: int,
        *,
        log_dir: Path,
        cpus_per_client: float = 1.0,
        address: str = "",
        env: Mapping[str, str] | None = None,
        server_threads: int | None = None,
        client_threads: int | None = None,
    ) -> None:
        """Describe the simulation; it starts with :meth:`run`.

        Args:
            owners: simulated owners.
            log_dir: where ``serverapp.log`` and ``clientapps.log`` go.
            cpus_per_client: cores a host counts as; floor(cores / cpus_per_client) are started, at
                most one for each core.
            address: of a Ray cluster, as ``ray.init`` takes it; empty: one of its own.
            env: variables for all processes; wins over everything set here.
            server_threads: compute threads of the server's process.
            client_threads: compute threads of each host; None: one.

        Raises:
            ConfigError: if a parameter is out of its range.
        """
        check(owners >= 1, "owners", owners, ">= 1")
        positive = cpus_per_client > 0 and math.isfinite(cpus_per_client)
        check(positive, "cpus_per_client", cpus_per_client, "> 0 and finite (cores)")
        super().__init__(log_dir, env, server_threads, client_threads or 1)
        cores = machine_cores()
        self.hosts = max(1, min(owners, cores, math.floor(cores / cpus_per_client)))
        self.address = address

    def _start(self) -> None:
        """Nothing runs before a run does."""

    def run(
        self,
        config: RunConfig,
        homes: Path,
        *,
        timeout_s: float | None = None,
        on_line: OnLine | None = None,
    ) -> None:
        """Carry out a run and return when it has ended.

        Args:
            config: its settings.
            homes: folder of the owners' homes, on this machine.
            timeout_s: seconds after which it is stopped; None waits for ever.
            on_line: called in this thread with each line of server (``serverapp``) and owners
                (``clientapp``) as it comes.  What it raises ends the call.

        Raises:
            RunError: the run failed, or took too long; names the log and its last lines.
        """
        told = {
            "run": config.to_flat(),
            "hosts": self.hosts,
            "address": self.address,
            "homes": str(homes),
            "scratch": str(self.processes.ray_root),
            "variables": thread_environment(self.client_threads),
        }
        path = self.processes.folder("told") / "run.json"
        path.write_text(json.dumps(told), encoding="utf-8")
        threads = thread_environment(self.server_threads, patient=False)
        child = self._spawn(
            "serverapp",
            [sys.executable, "-P", "-m", SERVER, str(path)],
            {**RAY, **self._credentials(), **threads},
            route=route_app_line,
            logs={"clientapp": self.log_dir / "clientapps.log"},
        )
        self._follow(child, None if timeout_s is None else time.monotonic() + timeout_s, on_line)

    def _credentials(self) -> dict[str, str]:
        """Return what makes this process one of the cluster's."""
        if not self.address:
            return ray_credentials()
        names = (RAY_AUTH_MODE, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH)
        return {name: os.environ[name] for name in names if name in os.environ}

    def _follow(self, child: Child, deadline: float | None, on_line: OnLine | None) -> None:
        while True:
            ended = not child.alive
            if ended:
                child.finish_log()
            while (line := self._next_line(0.0 if ended else 0.1)) is not None:
                if on_line is not None:
                    on_line(line)
                if deadline is not None and time.monotonic() > deadline:
                    break
            if ended:
                break
            if deadline is not None and time.monotonic() > deadline:
                raise child.failure("the run did not end in time and was stopped")
        if child.process.returncode != 0:
            self._keep_ray_logs()
            raise child.failure("the run failed")
