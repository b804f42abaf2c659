"""Simulated owners: one process runs the ServerApp and Ray, Ray's actors run the ClientApps."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from fedsplit.errors import check
from simulations.runtime import hooks
from simulations.runtime.environment import RAY, ray_credentials, thread_environment
from simulations.runtime.federation import Federation
from simulations.runtime.machine import machine_cores

# ThreadPoolExecutor()'s default, which Flower's engine uses.
ENGINE_MAX_THREADS = 32
ENGINE_EXTRA_THREADS = 4


def actors_at_once(supernodes: int, cpus_per_client: float) -> int:
    """Return how many owners Flower's engine works for at the same time on this machine."""
    return min(
        supernodes,
        math.floor(machine_cores() / cpus_per_client + 1e-9),
        ENGINE_MAX_THREADS,
        (os.cpu_count() or 1) + ENGINE_EXTRA_THREADS,
    )


class Simulation(Federation):
    """Many owners on one machine, by Flower's simulation engine on Ray.

    Attributes:
        actors: client processes, which is also how many messages run at the same time.  At most
            min(32, cores + 4): the engine hands messages to that many threads of a
            ``ThreadPoolExecutor()``, and further actors would start and never be used.

    Messages to different nodes of one ``send_and_receive`` start in the order of the partitions,
    whatever their order in the call: the engine visits the nodes by partition every 0.1 s, takes
    one message from each into one queue, and the next free actor takes the next one.  A visit that
    comes while messages are being stored begins in the middle, so the order may be rotated; and
    which actor takes a message is not determined.  For fixed waves send one wave at a time, at most
    ``actors`` messages each.  Node ids are random in each run: ask nodes for their partition.
    """

    def __init__(
        self,
        supernodes: int,
        *,
        log_dir: Path,
        cpus_per_client: float = 1.0,
        gpus_per_client: float = 0.0,
        env: Mapping[str, str] | None = None,
        server_threads: int | None = None,
        client_threads: int | None = None,
    ) -> None:
        """Describe the federation; it starts with the ``with`` statement.

        Args:
            supernodes: simulated owners; their ``partition-id`` is 0 ... supernodes - 1.
            log_dir: where ``superlink.log``, ``serverapp.log`` and ``clientapps.log`` go.
            cpus_per_client: cores an actor counts as; floor(cores / cpus_per_client) actors are
                started, at most one per owner and min(32, cores + 4).  Bookkeeping only: nothing
                binds an actor to cores.
            gpus_per_client: GPUs an actor counts as; with 0 Ray hides all GPUs from the actors.
            env: variables for all processes; wins over everything set here.
            server_threads: compute threads of the ServerApp's process.
            client_threads: compute threads of each actor; None is max(1, floor(cpus_per_client)).

        Raises:
            ConfigError: if a parameter is out of its range.
        """
        check(supernodes >= 1, "supernodes", supernodes, ">= 1")
        positive = cpus_per_client > 0 and math.isfinite(cpus_per_client)
        check(positive, "cpus_per_client", cpus_per_client, "> 0 and finite (cores)")
        cores = machine_cores()
        bound = f"<= {cores}, the cores of this machine, or no client could run"
        check(cpus_per_client <= cores, "cpus_per_client", cpus_per_client, bound)
        check(gpus_per_client >= 0, "gpus_per_client", gpus_per_client, ">= 0")
        threads = client_threads or max(1, math.floor(cpus_per_client))
        super().__init__(log_dir, env, server_threads, threads)
        self.supernodes = supernodes
        self.gpus_per_client = gpus_per_client
        self.actors = actors_at_once(supernodes, cpus_per_client)

    def _start(self) -> None:
        more = {
            **RAY,
            **ray_credentials(),
            **thread_environment(self.server_threads, patient=False),
        }
        more |= {
            "RAY_TMPDIR": str(self.processes.ray_root),
            "RAY_RUNTIME_ENV_HOOK": hooks.RAY_HOOK,
            hooks.CLIENT_ENVIRONMENT_VARIABLE: json.dumps(thread_environment(self.client_threads)),
        }
        self._python_path = [hooks.FOLDER]
        self._start_superlink(["--insecure", "--simulation"], more, tls=None)

    def _submission(self) -> list[str]:
        # client-resources-num-cpus is an integer in Flower's protocol, so fractions of a core are
        # expressed by telling Ray that the machine has as many CPUs as there shall be actors.
        values = [
            f"num-supernodes={self.supernodes}",
            "client-resources-num-cpus=1",
            f"init-args-num-cpus={self.actors}",
            f"client-resources-num-gpus={float(self.gpus_per_client)}",
        ]
        return ["--federation-config", " ".join(values)]
