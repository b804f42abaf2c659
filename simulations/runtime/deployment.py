"""A real federation on the loopback interface: SuperLink with TLS, SuperNodes as processes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedsplit.deploy.flower_commands import find_command
from fedsplit.deploy.node import node_config_text
from fedsplit.errors import check
from simulations.runtime.certificates import NodeKey, make_node_key
from simulations.runtime.child_processes import Child, free_port, is_port_taken, wait_until
from simulations.runtime.environment import thread_environment
from simulations.runtime.federation import CONNECTION, START_ATTEMPTS, START_TIMEOUT_S, Federation
from simulations.runtime.submission import Scalar

CONNECTED = re.compile(r"SuperNode ID: (\d+)")


class Deployment(Federation):
    """SuperLink and SuperNodes as an operator would start them, all on this machine.

    Every message starts a new ClientApp process at its SuperNode, so module state does not outlive
    a message: an app keeps it on disk, in a folder named by its SuperNode's node config.
    """

    def __init__(
        self,
        supernodes: int,
        *,
        log_dir: Path,
        node_configs: Sequence[Mapping[str, Scalar]] | None = None,
        node_auth: bool = False,
        env: Mapping[str, str] | None = None,
        server_threads: int | None = None,
        client_threads: int | None = None,
    ) -> None:
        """Describe the federation; it starts with the ``with`` statement.

        Args:
            supernodes: number of SuperNodes.
            log_dir: where ``superlink.log``, ``serverapp.log`` and ``supernode-<i>.log`` go; the
                last holds the ClientApp's output too.
            node_configs: one per SuperNode, added to ``partition-id`` and ``num-partitions``, which
                it may override.
            node_auth: register an EC key per SuperNode and let no other node in.
            env: variables for all processes; wins over everything set here.
            server_threads: compute threads of the ServerApp.
            client_threads: compute threads of each ClientApp.

        Raises:
            ConfigError: if a parameter is out of its range.
        """
        check(supernodes >= 1, "supernodes", supernodes, ">= 1")
        configs = list(node_configs) if node_configs is not None else [{}] * supernodes
        given, bound = len(configs), f"{supernodes}, one per SuperNode"
        check(given == supernodes, "len(node_configs)", given, bound)
        super().__init__(log_dir, env, server_threads, client_threads)
        self.supernodes = supernodes
        self.node_auth = node_auth
        self.node_configs: list[dict[str, Scalar]] = [
            {"partition-id": index, "num-partitions": supernodes, **config}
            for index, config in enumerate(configs)
        ]
        self.node_ids: list[int] = []
        for config in self.node_configs:
            node_config_text(config)
        self._nodes: list[Child] = []
        self._keys: list[NodeKey] = []

    def _start(self) -> None:
        self.node_ids = []
        tls = self.certificates
        arguments = ["--ssl-certfile", str(tls.cert), "--ssl-keyfile", str(tls.key)]
        arguments += ["--ssl-ca-certfile", str(tls.ca)]
        if self.node_auth:
            arguments.append("--enable-supernode-auth")
        self._start_superlink(
            arguments, thread_environment(self.server_threads, patient=False), tls
        )
        if self.node_auth:
            self._make_keys()
        self._nodes = [self._start_supernode(index) for index in range(self.supernodes)]
        self._wait_for_nodes()

    def _start_supernode(self, index: int) -> Child:
        name = f"supernode-{index}"
        arguments = ["--superlink", self.address, "--root-certificates", str(self.certificates.ca)]
        arguments += ["--node-config", node_config_text(self.node_configs[index])]
        arguments += ["--host", "127.0.0.1", "--port", str(free_port())]
        if self.node_auth:
            arguments += ["--auth-supernode-private-key", str(self._keys[index].private)]
        command = [find_command("flower-supernode"), *arguments]
        return self._spawn(name, command, thread_environment(self.client_threads))

    def _make_keys(self) -> None:
        """Make the nodes' keys and let the SuperLink know them."""
        folder = self.processes.folder("keys")
        self._keys = [make_node_key(folder, f"supernode-{i}") for i in range(self.supernodes)]
        for key in self._keys:
            self._flwr("supernode", "register", str(key.public), CONNECTION)

    def _wait_for_nodes(self) -> None:
        for attempt in range(START_ATTEMPTS):
            wait_until(lambda: all(map(is_settled, self._nodes)), START_TIMEOUT_S)
            for index, child in enumerate(self._nodes):
                if attempt < START_ATTEMPTS - 1 and is_port_taken(child):
                    self._nodes[index] = self._start_supernode(index)
            if all(map(is_settled, self._nodes)):
                break
        for child in self._nodes:
            node_id = _node_id(child)
            if node_id is None or not child.alive:
                raise child.failure(f"did not connect to the SuperLink in {START_TIMEOUT_S:.0f} s")
            self.node_ids.append(node_id)

    def _workers(self) -> list[Child]:
        return self._nodes

    def _submission(self) -> list[str]:
        return []


def _node_id(child: Child) -> int | None:
    """Return the number that the SuperLink gave a SuperNode, from its log."""
    found = [CONNECTED.search(line) for line in list(child.tail)]
    return next((int(match.group(1)) for match in found if match), None)


def is_settled(child: Child) -> bool:
    """Whether a SuperNode has its number from the SuperLink, or has ended."""
    if not child.alive:
        child.finish_log(0.5)
    return _node_id(child) is not None or not child.alive
