"""Hosts as Ray actors: on this machine, or on every node of a cluster.

The owners' data, read and shared out once, and what the server hands out go through Ray's object
store: each node holds one copy.  Messages, and with them the sessions' tokens, are arguments of the
actors' calls; no name, log line or key of anything in Ray tells of them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from flwr.app import Message
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import fedsplit
import simulations
import strategies
from fedsplit.errors import RunError
from fedsplit.owners.data_source import Shares
from fedsplit.owners.naming import HOME_VARIABLE, SHARED_VARIABLE, SIMULATION_VARIABLE
from simulations.runtime.hosts.host_grid import HostLost
from simulations.runtime.hosts.owner_host import HostSettings, Order, OwnerHost

START_S = 600.0
ASK_S = 60.0
MOST_ON_A_NODE = 16
STORE_BYTES = 512 << 20  # of a cluster of our own
CALLS = 4  # batches that a host works at together, rounds' and names'


class OwnerHostActor:
    """The process of a host.

    Args:
        settings: of the run.
        shares: the owners' data.
        homes: folder of the owners' homes; None: a new one of this process, removed at the end.
    """

    def __init__(self, settings: HostSettings, shares: Shares, homes: str | None) -> None:
        self._own = tempfile.mkdtemp(prefix="fedsplit-homes-") if homes is None else None
        root = Path(homes or str(self._own))
        os.environ[SIMULATION_VARIABLE] = "1"
        os.environ[HOME_VARIABLE] = str(root)
        os.environ[SHARED_VARIABLE] = str(root.with_name(f"{root.name}-shared"))
        self._host = OwnerHost(settings, root, shares)

    def ready(self) -> str:
        """Return the number of this process: it is there."""
        return str(os.getpid())

    def keep(self, kind: str, digest: str, files: dict[str, bytes]) -> None:
        """Keep what the server hands out."""
        self._host.keep(kind, digest, files)

    def answer(self, orders: Sequence[Order]) -> Iterator[list[Message]]:
        """Yield the replies as they come."""
        yield from self._host.answer(orders)

    def sent(self) -> list[dict[str, Any]]:
        """Return what the owners' ledgers here say."""
        return self._host.sent()

    def close(self) -> None:
        """Let threads and folders go."""
        self._host.close()
        if self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)
            shutil.rmtree(f"{self._own}-shared", ignore_errors=True)


class RayHost:
    """One host, from the server's process.

    Args:
        name: of the host, for messages.
        actor: its handle.
    """

    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self.actor = actor

    def answer(self, orders: Sequence[Order]) -> Iterator[list[Message]]:
        """Yield the replies as they come.

        Raises:
            HostLost: the actor, or its node, is gone.
        """
        try:
            for found in self.actor.answer.options(num_returns="streaming").remote(list(orders)):
                yield ray.get(found)
        except RayError as error:
            raise HostLost(type(error).__name__) from None


def join(address: str, hosts: int, variables: Mapping[str, str], folder: Path) -> list[str]:
    """Start Ray here, or join a cluster; return the nodes that hosts are to be on, by id.

    Args:
        address: of a cluster; empty: one of our own, for ``hosts`` processes.
        hosts: of our own cluster.
        variables: of the hosts' environment.
        folder: where our own cluster keeps its files.

    Raises:
        RunError: no cluster answers there, or none of its nodes has a processor.
    """
    common: dict[str, Any] = {"log_to_driver": True, "logging_level": "WARNING"}
    if not address:
        ray.init(
            num_cpus=hosts,
            object_store_memory=STORE_BYTES,
            runtime_env={"env_vars": dict(variables)},
            _temp_dir=str(folder),
            include_dashboard=False,
            **common,
        )
        return [ray.get_runtime_context().get_node_id()] * hosts
    try:
        ray.init(address=address, runtime_env=runtime_environment(variables), **common)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunError(f"ray-address={address!r}: no cluster answers: {error}") from None
    return places(alive_nodes())


def runtime_environment(variables: Mapping[str, str]) -> dict[str, Any]:
    """Return the runtime environment of a cluster's processes: the project, and ``variables``.

    The nodes need the packages that the project asks for.
    """
    packages = (fedsplit, strategies, simulations)
    modules = [str(Path(str(package.__file__)).parent) for package in packages]
    return {
        "env_vars": dict(variables),
        "py_modules": modules,
        "excludes": ["__pycache__", "*.pyc"],
    }


def places(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the node of each host: one for every processor, first all nodes' first ones.

    Raises:
        RunError: no node has a processor.
    """
    room = {
        str(node["NodeID"]): min(MOST_ON_A_NODE, int(node["Resources"].get("CPU", 0)))
        for node in sorted(nodes, key=lambda node: str(node["NodeID"]))
    }
    found = [node for turn in range(MOST_ON_A_NODE) for node, cpus in room.items() if turn < cpus]
    if not found:
        raise RunError(f"ray cluster of {len(room)} nodes: must have a CPU for owners")
    return found


def addresses() -> set[str]:
    """Return the addresses of the cluster's nodes."""
    return {str(node["NodeManagerAddress"]) for node in alive_nodes()}


def own_address() -> str:
    """Return this machine's address, as the cluster knows it."""
    util: Any = ray.util
    return str(util.get_node_ip_address())


def alive_nodes() -> list[Mapping[str, Any]]:
    """Return the cluster's nodes that are there."""
    cluster: Any = ray
    return [node for node in cluster.nodes() if node["Alive"]]


def start_hosts(
    nodes: Sequence[str], settings: HostSettings, shares: Shares, homes: Path | None
) -> list[RayHost]:
    """Start a host on each of ``nodes`` and wait for them.

    Args:
        nodes: ids, several times where several hosts are.
        settings: of the run.
        shares: the owners' data.
        homes: folder of the owners' homes, on a machine of our own; None: one at each host.

    Raises:
        RunError: a host did not come up.
    """
    data = ray.put(shares)
    remote: Any = ray.remote
    cls = remote(num_cpus=1, max_concurrency=CALLS, max_restarts=0)(OwnerHostActor)
    hosts = []
    for number, node in enumerate(nodes):
        place = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        actor = cls.options(scheduling_strategy=place).remote(
            settings, data, None if homes is None else str(homes)
        )
        hosts.append(RayHost(f"host-{number}", actor))
    try:
        ray.get([host.actor.ready.remote() for host in hosts], timeout=START_S)
    except (RayError, GetTimeoutError) as error:
        raise RunError(f"a host of simulated owners did not start: {error}") from None
    return hosts


def hand_out(hosts: Sequence[RayHost], kind: str, digest: str, files: Mapping[str, bytes]) -> None:
    """Give every host what the server hands out, so that no owner need fetch it.

    Raises:
        RunError: a host could not keep it.
    """
    content = ray.put(dict(files))
    try:
        for host in hosts:  # one after another: those of a machine share the folder
            ray.get(host.actor.keep.remote(kind, digest, content), timeout=START_S)
    except RayError as error:
        raise RunError(f"{kind} could not be handed out to {host.name}: {error}") from None


def gather_sent(hosts: Sequence[RayHost]) -> list[dict[str, Any]]:
    """Return what the owners' ledgers say, at the hosts that are still there."""
    found: dict[str, dict[str, Any]] = {}
    for host in hosts:
        with contextlib.suppress(RayError):
            for row in ray.get(host.actor.sent.remote(), timeout=ASK_S):
                found[str(row["owner"])] = row
    return [found[name] for name in sorted(found)]


def stop_hosts(hosts: Sequence[RayHost]) -> None:
    """End the hosts' processes, and this process's part in the cluster."""
    for host in hosts:
        with contextlib.suppress(RayError):
            ray.get(host.actor.close.remote(), timeout=ASK_S)
        with contextlib.suppress(RayError, ValueError):
            ray.kill(host.actor)
    ray.shutdown()
