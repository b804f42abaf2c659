"""Whose a name is: the node key that first used it, or the one on the server's own list.

Flower identifies a node by a key pair and, with ``--enable-supernode-auth``, lets only registered
keys in.  A name that an owner says of itself is bound to that key.  The server's list is a folder
as ``fedsplit keys init`` makes it, ``OWNERS/NAME/node.pub``, named by ``FEDSPLIT_OWNER_KEYS``: a
name is then its listed key's, and no other name is admitted.

In a simulation nodes have keys of the moment, so names belong to whoever is connected.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_public_key,
    load_ssh_public_key,
)
from flwr.serverapp import Grid

from fedsplit.errors import ConfigError, SessionError

VARIABLE = "FEDSPLIT_OWNER_KEYS"
SIMULATION = "FEDSPLIT_SIMULATION"
KEY_FILE = "node.pub"


def fingerprint(key: bytes) -> str:
    """Return the SHA-256 of a public key (PEM, DER or OpenSSH), of other bytes as they are."""
    for load in (load_pem_public_key, load_der_public_key, load_ssh_public_key):
        try:
            found = load(key)
        except (ValueError, UnsupportedAlgorithm):
            continue
        key = found.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        break
    return hashlib.sha256(key).hexdigest()


def node_keys(grid: Grid) -> dict[int, str]:
    """Return the connected nodes -> their keys' fingerprints; empty where Flower tells none."""
    found = {}
    for node in grid.get_nodes():
        key = bytes(getattr(node, "public_key", b""))
        found[int(node.node_id)] = fingerprint(key) if key else ""
    return found


class OwnerKeys:
    """Names and the keys that they belong to.

    Args:
        listed: name -> fingerprint, the server's list; None: whoever comes first.
        lasting: whether nodes keep their keys; if not, nothing is bound.

    Attributes:
        bound: name -> fingerprint of the key that it belongs to.
    """

    def __init__(self, listed: dict[str, str] | None = None, *, lasting: bool = True) -> None:
        self.bound = dict(listed or {})
        self._listed = listed is not None
        self._lasting = lasting

    @classmethod
    def from_environment(cls) -> OwnerKeys:
        """Return what the machine's environment says.

        Raises:
            ConfigError: the list is no such folder, or holds no key.
        """
        folder = os.environ.get(VARIABLE, "")
        if not folder:
            return cls(lasting=os.environ.get(SIMULATION, "") != "1")
        try:
            files = sorted(Path(folder).glob(f"*/{KEY_FILE}"))
            listed = {file.parent.name: fingerprint(file.read_bytes().strip()) for file in files}
        except OSError as error:
            raise ConfigError(f"{VARIABLE}={folder}: must be readable: {error}") from None
        if not listed:
            raise ConfigError(f"{VARIABLE}={folder}: must hold NAME/{KEY_FILE}")
        return cls(listed)

    def claim(self, name: str, key: str) -> None:
        """Bind a name to a node's key, or check that it is that key's.

        Args:
            name: that the node says it has.
            key: its fingerprint; empty: unknown.

        Raises:
            SessionError: it is another key's, the key has another name, or the name is not on the
                server's list.
        """
        if self._listed and name not in self.bound:
            raise SessionError(f"owner's name {name!r}: not on the server's list of owners")
        if not self._lasting or not (key or self._listed):
            return
        if not self._listed:  # else one key would have two votes, or come back without its blame
            others = [n for n, other in self.bound.items() if other == key and n != name]
            if others:
                raise SessionError(
                    f"owner's name {name!r}: its node key has the name {others[0]!r} already"
                )
        if self.bound.setdefault(name, key) != key:
            raise SessionError(
                f"owner's name {name!r}: belongs to another node key, {self.bound[name][:16]}"
            )

    def restore(self, bound: Iterable[tuple[str, str]]) -> None:
        """Go on with an interrupted run's bindings; the server's list takes precedence."""
        if self._lasting and not self._listed:
            self.bound.update(bound)


class OwnerNames:
    """The names of one run's nodes, each claimed by the node that says it.

    Args:
        keys: whose names are; None: as the environment says.

    Attributes:
        names: node -> its owner's name, as far as it was told.
    """

    def __init__(self, keys: OwnerKeys | None = None) -> None:
        self.names: dict[int, str] = {}
        self.keys = keys or OwnerKeys.from_environment()
        self._connected: dict[int, str] | None = None  # node -> fingerprint
        self._lock = threading.Lock()

    def connected(self, grid: Grid) -> list[int]:
        """Return the nodes that are connected, in order."""
        self._connected = node_keys(grid)
        return sorted(self._connected)

    def take_known(self, grid: Grid) -> None:
        """Take the names that the grid itself knows (a simulation's): nobody need be asked.

        Raises:
            SessionError: see :meth:`claim`.
        """
        told: Mapping[int, str] = getattr(grid, "owner_names", {})
        known = {node: name for node, name in told.items() if node not in self.names}
        if self.names or len(set(known.values())) < len(known):
            for node, name in known.items():
                self.claim(node, name)
            return
        for node, name in known.items():  # thousands, and none of them can be another's
            self.keys.claim(name, (self._connected or {}).get(node, ""))
        self.names.update(known)

    def claim(self, node: int, name: str) -> None:
        """Give a node the name that it says its owner has.

        Raises:
            SessionError: the name is another key's or another connected node's, or the node has
                used another one before.
        """
        with self._lock:
            known = self.names.get(node)
            if known not in (None, name):
                raise SessionError(f"owner's name {name!r}: must be {known!r}, as before")
            others = [n for n, other in self.names.items() if other == name and n != node]
            there = self.names if self._connected is None else self._connected
            if any(other in there for other in others):
                raise SessionError(f"owner's name {name!r}: another node has it already")
            self.keys.claim(name, (self._connected or {}).get(node, ""))
            for other in others:  # it has gone, and come back under another id
                del self.names[other]
            self.names[node] = name
