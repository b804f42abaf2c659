"""``node.toml``: what one data owner's machine connects to, and with what.

The policy says what may leave; this file says where the SuperLink is, which authority vouches for
it, which key the node shows, and where the owner's own data lies.  Both stay on the machine.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsplit.errors import ConfigError, check
from fedsplit.owners.naming import owner_name

Scalar = bool | int | float | str

TEMPLATE = Path(__file__).with_name("node.toml")
"""The commented file that `fedsplit owner init` writes."""

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PATHS = ("ca", "key", "home", "client-certificate", "client-key")
_NEEDED = ("superlink", "ca", "key", "home", "node")
# Set from the file's own keys; in [node] they could only contradict them.
_OURS = {"state-dir": "home", "policy": "--policy", "session-ca": "ca"}
_NODE_PATHS = ("data-path", "test-path")


def split_address(address: str, name: str) -> tuple[str, int]:
    """Return (host, port) of ``host:port`` or ``[IPv6]:port``.

    Raises:
        ConfigError: if it is neither.
    """
    match = _ADDRESS.fullmatch(address)
    good = match is not None and 0 < int(match[2]) < 65536
    check(good, name, address, "host:port or [IPv6]:port")
    assert match is not None
    return match[1].strip("[]"), int(match[2])


def node_config_text(config: Mapping[str, Scalar]) -> str:
    """Return ``config`` as the argument of ``flower-supernode --node-config``.

    Raises:
        ConfigError: for a key or value that Flower's parser cannot express.
    """
    words = []
    for key, value in config.items():
        good = _KEY.fullmatch(key) is not None
        check(good, "node config key", key, "up to 64 letters, digits, - and _")
        check(type(value) in (bool, int, float, str), key, value, "a bool, int, float or str")
        if isinstance(value, bool):
            text = str(value).lower()
        elif isinstance(value, str):
            # A TOML literal string ('...') takes all but ' and line breaks, without escapes.
            plain = "'" not in value and not any(ord(c) < 32 or ord(c) == 127 for c in value)
            check(plain, key, value, "without ' and control characters")
            text = f"'{value}'"
        else:
            text = repr(value)
        words.append(f"{key}={text}")
    return " ".join(words)


@dataclass(frozen=True)
class NodeFile:
    """A parsed ``node.toml``; relative paths in it are relative to its folder.

    Attributes:
        source: the file.
        superlink: ``host:port`` of the SuperLink.
        ca: PEM of the authority that vouches for SuperLink and session server.
        key: the node's private key (OpenSSH, NIST curve).
        home: the owner's folder: noise secret, ledger, bottoms; Flower's own state below it.
        node: Flower's node config: ``owner``, ``data-path``, ...
        session: ``host:port`` of the session server, only for ``fedsplit owner check``.
        port: loopback port of the SuperNode's own API; 0 = any free one.
        client: certificate and key for mutual TLS, or None.
    """

    source: Path
    superlink: str
    ca: Path
    key: Path
    home: Path
    node: dict[str, Scalar] = field(default_factory=dict)
    session: str = ""
    port: int = 0
    client: tuple[Path, Path] | None = None

    @classmethod
    def load(cls, path: Path) -> NodeFile:
        """Read a file.

        Raises:
            ConfigError: unreadable, not TOML, an unknown or missing key, or a wrong value.
        """
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"node file {path}: must be readable TOML: {error}") from None
        known = (*_NEEDED, "session", "port", "client-certificate", "client-key")
        for name, value in content.items():
            check(name in known, name, value, "one of " + ", ".join(known))
        for name in _NEEDED:
            check(name in content, name, None, f"given in {path}")
        folder = path.absolute().parent
        paths = {n: _path(folder, n, content[n]) for n in _PATHS if n in content}
        for name in ("superlink", "session"):
            if name in content:
                check(isinstance(content[name], str), name, content[name], "host:port")
                split_address(content[name], name)
        port = content.get("port", 0)
        check(type(port) is int and 0 <= port < 65536, "port", port, "in [0, 65535]; 0 = any")
        client = None
        if "client-certificate" in paths or "client-key" in paths:
            both = {"client-certificate", "client-key"} <= paths.keys()
            check(both, "client-certificate", None, "given together with client-key")
            client = (paths["client-certificate"], paths["client-key"])
        return cls(
            source=path,
            superlink=content["superlink"],
            ca=paths["ca"],
            key=paths["key"],
            home=paths["home"],
            node=_node(folder, content["node"]),
            session=content.get("session", ""),
            port=port,
            client=client,
        )

    @property
    def owner(self) -> str:
        """The owner's public name."""
        return owner_name(self.node)

    def node_config(self, policy: Path) -> dict[str, Scalar]:
        """Return the whole node config of the SuperNode."""
        whole: dict[str, Scalar] = {
            **self.node,
            "state-dir": str(self.home),
            "policy": str(policy.absolute()),
            "session-ca": str(self.ca),
        }
        if self.client is not None:
            whole["session-certificate"], whole["session-key"] = map(str, self.client)
        return whole


def _path(folder: Path, name: str, value: object) -> Path:
    check(isinstance(value, str) and bool(value), name, value, "a path")
    return (folder / Path(str(value)).expanduser()).absolute()


def _node(folder: Path, content: Any) -> dict[str, Scalar]:
    check(isinstance(content, dict), "node", content, "a table: [node]")
    found: dict[str, Scalar] = {}
    for name, value in content.items():
        if name in _OURS:
            raise ConfigError(f"node.{name}={value!r}: must be left out, {_OURS[name]} gives it")
        found[name] = value
        if name in _NODE_PATHS:
            kind, path = content.get("data-kind", "file"), _path(folder, name, value)
            if kind == "file" or (kind != "hub" and path.exists()):  # else a hub's name
                found[name] = str(path)
    owner_name(found)
    node_config_text(found)
    return found
