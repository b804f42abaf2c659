"""Flower's runtime, started for one purpose and stopped without a trace; names load on first use.

    with Simulation(4, cpus_per_client=0.5, log_dir=folder.logs) as federation:
        run = federation.run(app_dir, {"rounds": 3}, timeout_s=600, on_line=print)

:class:`Simulation` runs many owners on Ray, :class:`Deployment` runs a SuperLink with TLS and real
SuperNodes on the loopback interface.  Both use ports, homes and temporary folders of their own, so
that several can run beside each other, and beside the shared local SuperLink of ``flwr run``.

What the environment can do about threads: ``server_threads`` and ``client_threads`` set
``OMP_NUM_THREADS`` and its relatives before the first import, so torch's intra-op pool obeys.  In a
deployment ServerApp and ClientApps are separate processes.  In a simulation the ServerApp runs in
the process that starts Ray, and the actors get their values through Ray's runtime-environment hook.
Owners' idle threads are told to sleep, not spin (``OMP_WAIT_POLICY=PASSIVE``).  What it cannot do:
change a process that runs, bound torch's inter-op pool (``torch.set_num_interop_threads``), or bind
a process to cores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsplit.registry import lazy

if TYPE_CHECKING:
    from simulations.runtime.deployment import Deployment
    from simulations.runtime.federated import deploy, simulate
    from simulations.runtime.federation import Federation
    from simulations.runtime.local_run import run_in_process
    from simulations.runtime.simulation import Simulation
    from simulations.runtime.submission import FlowerRun

__all__ = [
    "Deployment",
    "Federation",
    "FlowerRun",
    "Simulation",
    "deploy",
    "run_in_process",
    "simulate",
]

__getattr__ = lazy(
    __name__,
    {
        "deployment": ("Deployment",),
        "federation": ("Federation",),
        "submission": ("FlowerRun",),
        "simulation": ("Simulation",),
        "federated": ("deploy", "simulate"),
        "local_run": ("run_in_process",),
    },
)
