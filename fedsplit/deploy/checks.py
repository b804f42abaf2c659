"""Whether an owner's machine is ready: one line for each thing that could stop or weaken it."""

from __future__ import annotations

import shutil
import socket
import ssl
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedsplit.deploy.certificates import load_private_key
from fedsplit.deploy.flower_commands import find_command
from fedsplit.deploy.guard import check_flower
from fedsplit.deploy.keys import WARN_DAYS, days_left, mode_fault
from fedsplit.deploy.node import NodeFile, split_address
from fedsplit.deploy.start import COMMANDS
from fedsplit.errors import ConfigError, FedsplitError, LedgerError
from fedsplit.owners.policy.rules import Policy

MIN_DISK_BYTES = 2 << 30  # bottoms, emulators and the ledger; a full disk stops all that leaves
CONNECT_S = 5.0
OK, WARN, FAIL, SKIPPED = "ok", "warn", "fail", "-"
# check -> what to do when it does not hold
REMEDIES = {
    "policy": "fedsplit policy init writes one, fedsplit policy check FILE explains it",
    "app digest": "review the app, then put what fedsplit owner digest APP prints into app.digest",
    "ca": "get a new ca.pem from the model owner (fedsplit keys renew), and compare fingerprints",
    "node key": "chmod 600; or fedsplit keys node makes a new one, to be registered anew",
    "client certificate": "ask the model owner for a new one",
    "client key": "chmod 600",
    "disk": "make room, or name another disk as home: a full one stops all that leaves",
    "home": "chmod go-w",
    "noise secret": "chmod 600; keep it: another one draws other noise for the same texts",
    "ledger": "fedsplit ledger verify names the line; do not start before you know why",
    "data": "correct data-path and its columns in the node file",
    "lengths": "nothing, or cut the texts yourself: a run reads no more of them",
    "labels": "agree with the other parties on label-names, and correct the rows that are named",
    "owner": "set owner in [node] of the node file",
    "superlink": "compare address and certificate with the model owner; look at the firewall",
    "session": "as for the SuperLink: sessions need a port of their own",
}


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        state: ``ok``, ``warn`` (works, weaker or not for long), ``fail``, ``-`` (not looked at).
        text: what was found.
        todo: what to do about it, where :data:`REMEDIES` does not say so.
    """

    name: str
    state: str
    text: str
    todo: str = ""

    @property
    def advice(self) -> str:
        """What to do about it."""
        if self.state == OK:
            return "nothing"
        return self.todo or REMEDIES.get(self.name, "mend what is said on the left")


def check_machine(
    node: NodeFile, policy: Path, *, network: bool = True, read: bool = True
) -> list[Check]:
    """Look at policy, keys, folders, data and the way to the server.

    Args:
        node: the machine's file.
        policy: the owner's policy.
        network: whether to connect to the server, and to fetch a hub's data.
        read: whether data is read as a run would; else only whether it is there.
    """
    steps: list[Callable[[], Iterator[Check]]] = [
        lambda: _policy(policy),
        lambda: _authority(node.ca),
        lambda: _node_key(node.key),
        lambda: _home(node.home),
        lambda: _data(node, network, read),
        _flower,
    ]
    if node.client is not None:
        certificate, key = node.client
        steps.append(lambda: _client(certificate, key))
    if network:
        steps.append(lambda: _reach("superlink", node.superlink, node.ca))
        if node.session:
            steps.append(lambda: _reach("session", node.session, node.ca, http2=True))
    found: list[Check] = []
    for step in steps:
        try:
            found += step()
        except FedsplitError as error:
            found.append(Check(type(error).__name__, FAIL, str(error)))
    return found


def reachable_or_refused(node: NodeFile) -> Check:
    """Return how the SuperLink answers: waiting mends all but a wrong certificate."""
    return next(_reach("superlink", node.superlink, node.ca))


def _policy(path: Path) -> Iterator[Check]:
    try:
        policy = Policy.load(path)
    except ConfigError as error:
        yield Check("policy", FAIL, str(error))
        return
    yield Check("policy", OK, f"{path}: {len(policy.rules)} rules")
    pinned = policy.rules.get("app.digest")
    if pinned:
        yield Check("app digest", OK, f"only {pinned} runs here")
    else:
        yield Check("app digest", FAIL, "app.digest is not set: fedsplit owner digest prints it")
    if not {"noise.min_ratio", "noise.mechanisms"} & policy.rules.keys():
        yield Check("policy", WARN, "no rule bounds the noise: fedsplit policy check says more")
    if "measure.min_empirical_privacy" not in policy:
        text = (
            "measure.min_empirical_privacy is not set: what noise hides of your texts is not tried"
        )
        yield Check("policy", WARN, text)
    if not policy.rules.get("transport.own_ca"):
        text = "transport.own_ca is not set; this machine pins its authority all the same"
        yield Check("policy", OK, text)


def _authority(path: Path) -> Iterator[Check]:
    pem = _read(path, "ca")
    left, end = days_left(pem, f"ca {path}")
    state = FAIL if left <= 0 else WARN if left < WARN_DAYS else OK
    yield Check("ca", state, f"{path}: until {end:%Y-%m-%d} ({left:.0f} days)")


def _node_key(path: Path) -> Iterator[Check]:
    fault = mode_fault(path)
    if fault:
        yield Check("node key", FAIL, f"{path}: {fault}")
        return
    key = load_private_key(_read(path, "key"), f"node key {path}")
    nist = key.curve.name.startswith("secp") and key.curve.name.endswith("r1")
    text = f"{path}: {key.curve.name}"
    yield Check("node key", OK if nist else FAIL, text if nist else f"{text}: must be a NIST curve")


def _client(certificate: Path, key: Path) -> Iterator[Check]:
    left, end = days_left(_read(certificate, "client-certificate"), str(certificate))
    state = FAIL if left <= 0 else WARN if left < WARN_DAYS else OK
    yield Check("client certificate", state, f"until {end:%Y-%m-%d} ({left:.0f} days)")
    fault = mode_fault(key)
    if fault:
        yield Check("client key", FAIL, f"{key}: {fault}")


def _home(home: Path) -> Iterator[Check]:
    existing = next(p for p in (home, *home.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    state = OK if free >= MIN_DISK_BYTES else WARN
    yield Check("disk", state, f"{existing}: {free / 2**30:.1f} GiB free, 2 GiB wanted")
    if not home.exists():
        yield Check("home", OK, f"{home}: will be made")
        return
    mode = stat.S_IMODE(home.stat().st_mode)
    if mode & 0o022:
        yield Check("home", FAIL, f"{home}: mode {mode:04o}: others can write to it")
    else:
        yield Check("home", OK, str(home))
    secret = home / "noise.secret"
    if secret.exists():
        fault = mode_fault(secret)
        text = fault or "private; back it up like a key"
        yield Check("noise secret", FAIL if fault else OK, f"{secret}: {text}")
    else:
        yield Check("noise secret", OK, f"{secret}: will be drawn on this machine at first use")
    if (home / "ledger.jsonl").exists():
        yield _ledger(home)


def _ledger(home: Path) -> Check:
    from fedsplit.owners.ledger.chain import read_ledger
    from fedsplit.owners.measuring import Figures

    try:
        count, measured = 0, ""
        for entry in read_ledger(home):
            count += 1
            if entry.get("kind") == "measured":
                measured = f"; last measured: {Figures.from_json(entry['measured'])}"
    except LedgerError as error:
        return Check("ledger", FAIL, str(error))
    return Check("ledger", OK, f"{home / 'ledger.jsonl'}: {count} lines, the chain holds{measured}")


def _data(node: NodeFile, network: bool, read: bool) -> Iterator[Check]:
    kind, given = str(node.node.get("data-kind", "file")), str(node.node.get("data-path", ""))
    if not given:
        yield Check("data", FAIL, "node.data-path: must name this owner's data")
    elif kind == "file" and not Path(given).exists():
        yield Check("data", FAIL, f"{given}: is not there")
    elif not read or (kind == "hub" and not network):
        yield Check("data", OK, f"{kind}: {given}")
    else:
        from fedsplit.deploy.data_check import look_at_data  # loads torch

        try:
            for name, state, text in look_at_data(node):
                yield Check(name, state, text)
        except FedsplitError as error:
            yield Check("data", FAIL, str(error))
    if "owner" not in node.node:
        yield Check("owner", WARN, f"node.owner is not set; the public name is {node.owner}")


def _flower() -> Iterator[Check]:
    from importlib.metadata import version

    for name in ("flower-supernode", "flower-superexec"):
        find_command(name)
    check_flower()
    yield Check("flwr", OK, f"{version('flwr')}; {len(COMMANDS)} commands are guarded")


def _reach(name: str, address: str, ca: Path, *, http2: bool = False) -> Iterator[Check]:
    """Shake hands with a TLS server as an owner's processes will."""
    host, port = split_address(address, name)
    try:
        context = ssl.create_default_context(cadata=_read(ca, "ca").decode("ascii", "replace"))
    except ssl.SSLError as error:
        yield Check(name, FAIL, f"ca {ca}: {error}")
        return
    if http2:
        context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), timeout=CONNECT_S) as raw,
            context.wrap_socket(raw, server_hostname=host) as wrapped,
        ):
            yield Check(name, OK, f"{address}: {wrapped.version()}, certificate and name verified")
    except ssl.SSLCertVerificationError as error:
        text = f"{address}: its certificate is not one that {ca} vouches for: "
        yield Check(name, FAIL, text + error.verify_message)
    except OSError as error:
        yield Check(name, WARN, f"{address}: no answer now: {error}")


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{name} {path}: must be readable: {error.strerror}") from None
