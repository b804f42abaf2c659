"""One small federation in this process, undisturbed and disturbed, and what a disturbance cost.

Owners and server talk over real TLS streams on the loopback interface that lead through a proxy
(:mod:`simulations.faults.proxy`).  What is lost is what the server's report says is lost, and
whether the final model is the undisturbed run's, bit for bit.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.errors import FedsplitError, SessionError
from simulations.faults.proxy import Proxy
from simulations.runtime.certificates import Certificates, make_certificates
from simulations.runtime.child_processes import free_port
from simulations.runtime.federated import owner_environment
from simulations.runtime.local_grid import LocalGrid
from simulations.runtime.local_run import environment, run_strategy

Model = dict[str, Tensor]
Row = dict[str, Any]


@dataclass
class RunOutcome:
    """What came of one start of the server."""

    model: Model = field(default_factory=dict)
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


class FaultTestbed:
    """Runs of one small federation, undisturbed and disturbed, with its files in ``folder``."""

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
    ) -> RunOutcome:
        """Start the server in ``name``'s folder, which may hold an interrupted run.

        ``tls`` are other certificates of the server than the owners expect, ``nodes`` owners' own
        node configs by index, ``out`` the server's folder where it is another.
        """
        self._runs += 1
        run_id, port = 100 + self._runs, free_port()
        server = out or self.folder / name
        session = replace(self.config.session, port=port)
        output = replace(self.config.output, dir=str(server))
        config = replace(self.config, session=session, output=output)
        tls = tls or self.tls
        error, began = "", time.monotonic()
        grid = LocalGrid(config, config.data.owners, run_id=run_id, first=1000 * self._runs)
        grid.node_configs = {i: {"session-ca": str(self.tls.ca)} for i in range(config.data.owners)}
        for index, more in (nodes or {}).items():
            grid.node_configs[index] |= more
        with Proxy(port) as proxy:
            variables = {
                **owner_environment(self.folder / "homes"),
                **tls.environment,
                "FEDSPLIT_SESSION_ADDRESS": f"127.0.0.1:{proxy.port}",
            }
            over = threading.Event()
            watcher = threading.Thread(target=self._watch, args=(fault, proxy, grid, over))
            watcher.start()
            try:
                with environment(variables):
                    run_strategy(config, grid)
            except FedsplitError as failed:
                error = f"{type(failed).__name__}: {failed}"
            finally:
                over.set()
                watcher.join()
        outcome = read_outcome(server, error)
        outcome.passed, outcome.seconds = proxy.passed, time.monotonic() - began
        return outcome

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

    def row(self, case: str, moment: str, outcome: RunOutcome, fault: Fault | None = None) -> Row:
        """Return the row of a run, and of the fault that was done to it."""
        if fault is not None and not fault.done:
            return row_of(case, moment, "not run: the run was over", None)
        recovered, note = (fault.recovered_s, fault.said) if fault else (None, "")
        return row_of(case, moment, self.lost(outcome), recovered, note)

    def lost(self, outcome: RunOutcome) -> str:
        """Return what a run lost, in words."""
        model, expected = outcome.model, self.reference.model
        text = describe_loss(outcome.error, model, expected, outcome.server)
        if not outcome.error and lost_owners(outcome.server) and same_model(model, expected):
            text += "; the model is the same, bit for bit"
        return text


def read_outcome(server: Path, error: str) -> RunOutcome:
    """Return the model and the report that a server left in its folder, as far as there are any."""
    outcome = RunOutcome(error=error)
    if (server / "top.safetensors").exists():
        outcome.model = load_file(server / "top.safetensors")
    if (server / "server.json").exists():
        outcome.server = json.loads((server / "server.json").read_text())
    return outcome


# ---- what was lost --------------------------------------------------------------------------


def same_model(model: Model, expected: Model) -> bool:
    """Return whether two models are the same, bit for bit."""
    names = model.keys()
    return names == expected.keys() and all(torch.equal(model[n], expected[n]) for n in names)


def lost_owners(server: Mapping[str, Any]) -> list[str]:
    """Return the owners that a server's report calls lost, with round, part and reason."""
    return [
        f"{name} in round {row['round']}, {part}: {why[:100]}"
        for row in server["rounds"]
        for part in ("train", "evaluate")
        for name, why in row.get(part, {}).get("lost", {}).items()
    ]


def describe_loss(error: str, model: Model, expected: Model, server: Mapping[str, Any]) -> str:
    """Return what a run lost beside the undisturbed one: itself, owners, bits, or nothing."""
    if error:
        return f"the run: {error[:200]}"
    same = "nothing" if same_model(model, expected) else "bits: the model differs"
    return "; ".join(lost_owners(server)) or same


def resumed(server: Mapping[str, Any]) -> list[str]:
    """Return where a server that was started again went on, in words, once for each start."""
    return [f"after round {r['after_round']}, step {r['step']}" for r in server.get("resumed", [])]


def row_of(case: str, moment: str, lost: str, recovered: float | None, note: str = "") -> Row:
    """Return one row of the fault matrix."""
    seconds = None if recovered is None else round(recovered, 2)
    return {"case": case, "moment": moment, "lost": lost, "recovered_s": seconds, "note": note}
