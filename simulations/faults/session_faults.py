"""Faults between owners and the session server: networks, strangers, certificates, disks."""

from __future__ import annotations

import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedsplit.errors import SessionError
from fedsplit.owners.handshake import hello
from fedsplit.wire.frames import Kind
from fedsplit.wire.messages import SessionOffer
from fedsplit.wire.stream import connect
from simulations.faults.clock_faults import in_a_process
from simulations.faults.proxy import Proxy
from simulations.faults.testbed import Fault, FaultTestbed, Row, resumed, row_of
from simulations.runtime.certificates import make_certificates
from simulations.runtime.local_grid import LocalGrid

DAY_S = 86_400.0
NOWHERE = "after round 0, step 0"
SLOW_S = 6.0
EXPIRES_S = 2.0
MARGIN = 4.0  # a certificate that expires during a run lives so many undisturbed runs


def _stranger(proxy: Proxy, grid: LocalGrid, *, replay: bool) -> str:
    """Say HELLO with a token that was used already, or as a node that was not asked."""
    offer = replace(SessionOffer.from_content(grid.sent[-1].content), digest="")
    if not replay:
        offer = replace(offer, token=offer.token[::-1], node=4711)
    ca = Path(grid.node_configs[0]["session-ca"]).read_bytes()
    try:
        with closing(connect(f"127.0.0.1:{proxy.port}", ca=ca)) as link:
            link.send(Kind.HELLO, hello(offer, "stranger"))
            return f"answered {link.recv(20.0).kind.name}"
    except SessionError as error:
        return f"refused: {error}"[:120]


def _slow_peer(proxy: Proxy, grid: LocalGrid) -> str:
    """Open a TLS connection and send one byte a second, for as long as the server lets us."""
    began = time.monotonic()
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection(("127.0.0.1", proxy.port)) as plain,
            context.wrap_socket(plain) as secured,
        ):
            secured.settimeout(1.0)
            while time.monotonic() - began < SLOW_S:
                secured.sendall(b"P")
                time.sleep(1.0)
    except OSError as error:
        return f"cut off after {time.monotonic() - began:.0f} s: {error}"[:120]
    return f"bore with for {SLOW_S:g} s"


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Callable[[str], None]]:
    """Mount a file system of that size; yields what changes its size.

    Raises:
        SessionError: this process may not mount.
    """
    path.mkdir(parents=True)

    def mount(*arguments: str) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", *arguments, "tmpfs", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SessionError(f"no small disk: {done.stderr.strip()[:100]}")

    mount("-o", f"size={size}")
    try:
        yield lambda larger: mount("-o", f"remount,size={larger}")
    finally:
        subprocess.run(["umount", "-l", str(path)], capture_output=True, check=False)


ACTS: dict[str, Callable[[Proxy, LocalGrid], str | None]] = {
    "network cut": lambda proxy, _: proxy.cut(),
    "network cut 5 s": lambda proxy, _: proxy.cut(5.0),
    "network stall 5 s": lambda proxy, _: proxy.stall(5.0),
    "network stall 60 s": lambda proxy, _: proxy.stall(60.0),
    "bit-flipped": lambda proxy, _: proxy.flip(),
    "truncated": lambda proxy, _: proxy.truncate(1000),
    "replayed token": partial(_stranger, replay=True),
    "unknown node": partial(_stranger, replay=False),
    "peer sends 1 byte/s": _slow_peer,
}


def in_passing(testbed: FaultTestbed, case: str, moments: list[float]) -> Iterator[Row]:
    """Run faults that a session should outlive, at several moments."""
    for number, moment in enumerate(moments):
        breaks = case.startswith(("network cut", "bit", "trunc"))
        fault = Fault(moment, ACTS[case], breaks)
        outcome = testbed.start(f"{case}-{number}".replace("/", " per "), fault)
        yield testbed.row(case, f"{moment:.0%} of bytes", outcome, fault)


def certificates(testbed: FaultTestbed, case: str, moments: list[float]) -> Iterator[Row]:
    """Run a server with a certificate no owner should accept, or an owner that pins another."""
    folder = testbed.folder / f"tls {case}"
    if case == "certificate expired":
        tls = make_certificates(folder, valid_days=EXPIRES_S / DAY_S)
        time.sleep(EXPIRES_S + 1)
        nodes = {i: {"session-ca": str(tls.ca)} for i in range(testbed.config.data.owners)}
        start = testbed.start(case, tls=tls, nodes=nodes)
    else:
        other = make_certificates(folder)
        start = testbed.start(case, nodes={0: {"session-ca": str(other.ca)}})
    yield testbed.row(case, "from the start", start)
    if start.error:  # and with the right one the run starts
        yield testbed.row(case, "put right", testbed.start(case))


def expiry(testbed: FaultTestbed, case: str, moments: list[float]) -> Iterator[Row]:
    """Let the certificate expire while owners are at work; the next start has a new one."""
    for number, moment in enumerate(moments):
        folder = testbed.folder / f"tls expiring {number}"
        lives = max(MARGIN * testbed.reference.seconds, 5.0)
        tls = make_certificates(folder, valid_days=lives / DAY_S)
        expires = time.monotonic() + lives

        def hold(proxy: Proxy, grid: LocalGrid, expires: float = expires) -> str:
            left = expires - time.monotonic()
            proxy.stall(max(left, 0.0) + 1.0)
            return f"held until the certificate had expired ({left:.1f} s)"

        fault = Fault(moment, hold)
        nodes = {i: {"session-ca": str(tls.ca)} for i in range(testbed.config.data.owners)}
        name = f"{case}-{number}"
        start = testbed.start(name, fault, tls=tls, nodes=nodes)
        told = f"{moment:.0%} of bytes"
        yield testbed.row(case, told, start, fault)
        if fault.done and start.error:
            again = testbed.start(name)
            where = f"gone on {(resumed(again.server) or [NOWHERE])[-1]}"
            yield row_of(case, f"{told}, then a new one", testbed.lost(again), None, where)


def clock(testbed: FaultTestbed, case: str, moments: list[float]) -> Iterator[Row]:
    """Move the wall clock an hour ahead and an hour back, in a process of its own."""
    try:
        yield from in_a_process(testbed.config, testbed.folder / "clock", case, moments)
    except (SessionError, subprocess.TimeoutExpired) as error:
        yield row_of(case, "any", f"not run: {error}"[:300], None)


def full_disk(testbed: FaultTestbed, case: str, moments: list[float]) -> Iterator[Row]:
    """Give the server too small a disk, then room, and start the run again."""
    need = sum(p.stat().st_size for p in (testbed.folder / "reference").rglob("*") if p.is_file())
    kept = testbed.reference.server["state"]
    room = need + int(3.2 * kept["bytes"] / kept["saves"])  # for two states, not for three
    path = testbed.folder / "disk"
    try:
        with small_disk(path, str(room)) as resize:
            start = testbed.start(case, out=path / "server")
            began = time.monotonic()
            first = testbed.lost(start)
            resize(str(20 * room))
            again = testbed.start(case, out=path / "server")
            where = (resumed(again.server) or [NOWHERE])[-1]
            note = f"first start: {first}; started again with room, it went on {where}"
            yield row_of(case, "in a state", testbed.lost(again), time.monotonic() - began, note)
    except SessionError as error:
        yield row_of(case, "in a state", f"not run: {error}", None)


CASES: dict[str, Callable[[FaultTestbed, str, list[float]], Iterator[Row]]] = {
    **dict.fromkeys(ACTS, in_passing),
    "certificate expired": certificates,
    "certificate expires during the run": expiry,
    "wrong CA": certificates,
    "clock jump": clock,
    "full disk": full_disk,
}
