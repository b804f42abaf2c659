"""Faults between owners and the session server: networks, strangers, certificates, clocks, disks.

Owners and server work in this process, over real TLS streams on the loopback interface that lead
through a proxy (:mod:`simulations.faults_proxy`).  What is lost is what the server's report says is
lost, and whether the final model is the undisturbed run's, bit for bit.
"""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, RecordDict
from safetensors.torch import load_file
from torch import Tensor

import fedsplit
from fedsplit.config import RunConfig
from fedsplit.errors import FedsplitError, SessionError
from fedsplit.wire.frames import PROTOCOL, Kind
from fedsplit.wire.messages import OFFER
from fedsplit.wire.stream import connect
from simulations.faults_proxy import Proxy
from simulations.federated import owner_environment
from simulations.local_grid import LocalGrid
from simulations.local_run import environment
from simulations.runtime.certificates import Certificates, make_certificates
from simulations.runtime.children import free_port
from strategies import split_tuning_run

DAY_S = 86_400.0
SLOW_S = 6.0
EXPIRES_S = 2.0


@dataclass
class Start:
    """One start of the server, and what came of it."""

    model: dict[str, Tensor] = field(default_factory=dict)
    server: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    passed: int = 0
    seconds: float = 0.0


@dataclass
class Fault:
    """What is done to a run.

    Attributes:
        moment: share of the undisturbed run's bytes after which it is done.
        act: what is done, with the proxy and the grid of the run.
        breaks: whether it breaks connections, so that work flows again over new ones.
        done: when, and when work flowed again, by ``time.monotonic``.
        said: what came of it besides, for the row.
    """

    moment: float
    act: Callable[[Proxy, LocalGrid], str | None]
    breaks: bool = False
    done: float = 0.0
    again: float = 0.0
    said: str = ""

    @property
    def recovered_s(self) -> float | None:
        """Seconds until work flowed again, None where it never did."""
        return self.again - self.done if self.again else None


class Bench:
    """Runs of one small federation, undisturbed and disturbed.

    Args:
        config: its settings.
        folder: for its files.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config = config
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run in the same --out
        self.tls = make_certificates(folder / "tls")
        self._runs = 0
        self.start("reference")  # owners have the bottom afterwards, so that steps are what passes
        shutil.rmtree(folder / "reference")
        self.reference = self.start("reference")
        if self.reference.error:
            raise SessionError(f"the undisturbed run failed: {self.reference.error}")

    def start(
        self,
        name: str,
        fault: Fault | None = None,
        *,
        tls: Certificates | None = None,
        nodes: Mapping[int, dict[str, Any]] | None = None,
        out: Path | None = None,
    ) -> Start:
        """Start the server in ``name``'s folder, which may hold an interrupted run.

        Args:
            name: of the folder.
            fault: what is done to it.
            tls: other certificates of the server than the owners expect.
            nodes: owners' own node configs, by index.
            out: the server's folder, where it is another.
        """
        self._runs += 1
        run_id, port = 100 + self._runs, free_port()
        server = out or self.folder / name
        session = replace(self.config.session, port=port)
        output = replace(self.config.output, dir=str(server))
        config = replace(self.config, session=session, output=output)
        tls = tls or self.tls
        result, began = Start(), time.monotonic()
        grid = LocalGrid(config, config.data.owners, run_id=run_id, first=1000 * self._runs)
        grid.node_configs = {i: {"session-ca": str(self.tls.ca)} for i in range(config.data.owners)}
        for index, more in (nodes or {}).items():
            grid.node_configs[index] |= more
        with Proxy(port) as proxy:
            variables = {
                **owner_environment(self.folder / "homes"),
                "FEDSPLIT_TLS_CERT": str(tls.cert),
                "FEDSPLIT_TLS_KEY": str(tls.key),
                "FEDSPLIT_TLS_CA": str(tls.ca),
                "FEDSPLIT_SESSION_ADDRESS": f"127.0.0.1:{proxy.port}",
            }
            over = threading.Event()
            watcher = threading.Thread(target=self._watch, args=(fault, proxy, grid, over))
            watcher.start()
            try:
                with environment(variables):
                    torch.manual_seed(config.seed)
                    context = Context(
                        run_id=run_id,
                        node_id=0,
                        node_config={},
                        state=RecordDict(),
                        run_config=dict(config.to_flat()),
                    )
                    split_tuning_run.run(grid, context, config)
                result.model = load_file(server / "top.safetensors")
            except FedsplitError as error:
                result.error = f"{type(error).__name__}: {error}"
            finally:
                over.set()
                watcher.join()
            result.passed = proxy.passed
        result.seconds = time.monotonic() - began
        if (server / "server.json").exists():
            result.server = json.loads((server / "server.json").read_text())
        return result

    def _watch(
        self, fault: Fault | None, proxy: Proxy, grid: LocalGrid, over: threading.Event
    ) -> None:
        if fault is None:
            return
        while proxy.passed < fault.moment * self.reference.passed:
            if over.wait(0.002):
                return
        fault.done = time.monotonic()
        before = proxy.connections
        fault.said = fault.act(proxy, grid) or ""
        while fault.breaks and proxy.connections == before and not over.wait(0.002):
            pass
        mark = proxy.passed
        while proxy.passed < mark + 4096:  # a frame or two, not the handshake's answer alone
            if over.wait(0.002):
                break
        fault.again = time.monotonic()

    # ---- what was lost ----------------------------------------------------------------------

    def same(self, start: Start) -> bool:
        """Whether the final model is the undisturbed run's."""
        mine, theirs = start.model, self.reference.model
        return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)

    def lost(self, start: Start) -> str:
        """Return what a run lost, in words."""
        if start.error:
            return f"the run: {start.error[:160]}"
        found = [
            f"{name} in round {row['round']}, {part}: {why[:100]}"
            for row in start.server["rounds"]
            for part in ("train", "evaluate")
            for name, why in row.get(part, {}).get("lost", {}).items()
        ]
        if found:
            return "; ".join(found)
        return "nothing" if self.same(start) else "bits: the model differs"


# ---- the faults -----------------------------------------------------------------------------


def _cut(seconds: float) -> Callable[[Proxy, LocalGrid], None]:
    return lambda proxy, grid: proxy.cut(seconds)


def _stall(seconds: float) -> Callable[[Proxy, LocalGrid], None]:
    return lambda proxy, grid: proxy.stall(seconds)


def _flip(proxy: Proxy, grid: LocalGrid) -> None:
    proxy.flip()


def _truncate(proxy: Proxy, grid: LocalGrid) -> None:
    proxy.truncate(1000)


def _answer(port: int, ca: Path, hello: dict[str, Any]) -> str:
    """Return what the session server says to a HELLO."""
    try:
        link = connect(f"127.0.0.1:{port}", ca=ca.read_bytes())
        try:
            link.send(Kind.HELLO, hello)
            return f"answered {link.recv(20.0).kind.name}"
        finally:
            link.close()
    except SessionError as error:
        return f"refused: {error}"[:120]


def _stranger(ca: Path, *, replay: bool) -> Callable[[Proxy, LocalGrid], str]:
    """Say HELLO with a token that was used already, or as a node that was not asked."""

    def act(proxy: Proxy, grid: LocalGrid) -> str:
        record = grid.sent[-1].content.config_records[OFFER]
        token, node = str(record["token"]), int(str(record["node"]))
        header = {
            "protocol": PROTOCOL,
            "version": fedsplit.__version__,
            "token": token if replay else token[::-1],
            "run": grid.run_id,
            "node": node if replay else 4711,
            "round": int(str(record["round"])),
            "mode": str(record["mode"]),
            "owner": "stranger",
            "bottom": "",
        }
        return _answer(proxy.port, ca, header)

    return act


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


# ---- the cases ------------------------------------------------------------------------------

Row = dict[str, Any]


def _row(case: str, moment: str, lost: str, recovered: float | None, note: str = "") -> Row:
    seconds = None if recovered is None else round(recovered, 2)
    return {"case": case, "moment": moment, "lost": lost, "recovered_s": seconds, "note": note}


def in_passing(bench: Bench, case: str, moments: list[float]) -> Iterator[Row]:
    """Faults that an undisturbed run would not have noticed, at several moments."""
    acts: dict[str, Callable[[Proxy, LocalGrid], str | None]] = {
        "network cut": _cut(0.0),
        "network cut 5 s": _cut(5.0),
        "network stall 5 s": _stall(5.0),
        "network stall 60 s": _stall(60.0),
        "bit-flipped": _flip,
        "truncated": _truncate,
        "replayed token": _stranger(bench.tls.ca, replay=True),
        "unknown node": _stranger(bench.tls.ca, replay=False),
        "peer sends 1 byte/s": _slow_peer,
    }
    for number, moment in enumerate(moments):
        breaks = case.startswith(("network cut", "bit", "trunc"))
        fault = Fault(moment, acts[case], breaks)
        start = bench.start(f"{case}-{number}".replace("/", " per "), fault)
        if not fault.done:
            yield _row(case, f"{moment:.0%} of bytes", "not run: the run was over", None)
            continue
        yield _row(case, f"{moment:.0%} of bytes", bench.lost(start), fault.recovered_s, fault.said)


def certificates(bench: Bench, case: str, moments: list[float]) -> Iterator[Row]:
    """A server that shows a certificate no owner should accept, and an owner that pins another."""
    folder = bench.folder / f"tls {case}"
    if case == "certificate expired":
        tls = make_certificates(folder, valid_days=EXPIRES_S / DAY_S)
        time.sleep(EXPIRES_S + 1)
        nodes = {i: {"session-ca": str(tls.ca)} for i in range(bench.config.data.owners)}
        start = bench.start(case, tls=tls, nodes=nodes)
    else:
        other = make_certificates(folder)
        start = bench.start(case, nodes={0: {"session-ca": str(other.ca)}})
    yield _row(case, "from the start", bench.lost(start), None)
    if start.error:  # and with the right one the run begins
        again = bench.start(case)
        yield _row(case, "put right", bench.lost(again), None)


def clock(bench: Bench, case: str, moments: list[float]) -> Iterator[Row]:
    """Not done from here: an offset in Python's clock alone is no jump of the machine's.

    gRPC computes deadlines from ``time.time`` and waits for them by the machine's own clock: with
    an offset in one of the two it waits for that long, which no real jump does.
    """
    yield _row(case, "any", "not run: needs libfaketime around the whole process", None)


def full_disk(bench: Bench, case: str, moments: list[float]) -> Iterator[Row]:
    """The server's disk is too small; later there is room and the run is started again."""
    need = sum(p.stat().st_size for p in (bench.folder / "reference").rglob("*") if p.is_file())
    kept = bench.reference.server["state"]
    room = need + int(3.2 * kept["bytes"] / kept["saves"])  # for two states, not for three
    path = bench.folder / "disk"
    try:
        with small_disk(path, str(room)) as resize:
            start = bench.start(case, out=path / "server")
            began = time.monotonic()
            first = bench.lost(start)
            resize(str(20 * room))
            again = bench.start(case, out=path / "server")
            told = again.server.get("resumed") or [{"after_round": 0, "step": 0}]
            where = f"after round {told[-1]['after_round']}, step {told[-1]['step']}"
            note = f"first start: {first}; started again with room, it went on {where}"
            yield _row(case, "in a state", bench.lost(again), time.monotonic() - began, note)
    except SessionError as error:
        yield _row(case, "in a state", f"not run: {error}", None)


CASES: dict[str, Callable[[Bench, str, list[float]], Iterator[Row]]] = {
    "network cut": in_passing,
    "network cut 5 s": in_passing,
    "network stall 5 s": in_passing,
    "network stall 60 s": in_passing,
    "bit-flipped": in_passing,
    "truncated": in_passing,
    "replayed token": in_passing,
    "unknown node": in_passing,
    "peer sends 1 byte/s": in_passing,
    "certificate expired": certificates,
    "wrong CA": certificates,
    "clock jump": clock,
    "full disk": full_disk,
}
