"""kill -9 of each process of a deployment, at moments that the server's kept states tell.

SuperLink (on its database file), SuperNodes with keys, ServerApp and ClientApps are real processes
on the loopback interface, under TLS.  What is killed is started again as an operator would: a
SuperLink or SuperNode with the same arguments, a ServerApp by another ``flwr run`` with the same
``output.dir``, a ClientApp not at all (its SuperNode starts one for the next message).
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from fedsplit.config import RunConfig
from fedsplit.errors import FedsplitError, RunError
from fedsplit.registry import pick
from simulations.faults.testbed import (
    Row,
    RunOutcome,
    describe_loss,
    read_outcome,
    resumed,
    row_of,
)
from simulations.runtime.certificates import Certificates, make_certificates
from simulations.runtime.child_processes import wait_until
from simulations.runtime.deployment import Deployment, is_settled
from simulations.runtime.federated import ROOT, owner_environment
from simulations.runtime.submission import app_processes, end_tree

TIMEOUT_S = 600.0
COMES_BACK_S = 180.0
RESTART_S = 10.0  # as a systemd unit with Restart=always does
STATE = re.compile(r"state-(\d+)\.json")


class FragileDeployment(Deployment):
    """A deployment whose processes can be killed and started again."""

    def _start_superlink(
        self, arguments: list[str], more: Mapping[str, str], tls: Certificates | None
    ) -> None:
        self._more = dict(more)
        database = str(self.processes.folder("database") / "superlink.db")
        super()._start_superlink([*arguments, "--database", database], more, tls)

    def kill_superlink(self) -> None:
        """Kill the SuperLink and start it again on its database."""
        old = self._superlink
        assert old is not None
        families = psutil.Process(old.process.pid).children(recursive=True)
        old.process.kill()
        old.process.wait()
        for process in families:  # a machine that goes down takes them with it
            end_tree(process)
        assert isinstance(old.process.args, list)
        self._superlink = self._spawn("superlink", list(map(str, old.process.args)), self._more)
        if not self._answers(self._superlink, self.certificates):
            raise self._superlink.failure("did not come back")

    def answers(self) -> bool:
        """Return whether the SuperLink's process runs."""
        return self._superlink is not None and self._superlink.alive

    def kill_serverapp(self) -> None:
        """Kill the ServerApp's process."""
        assert self._superlink is not None
        for process in app_processes(self._superlink.process.pid):
            end_tree(process)

    def kill_clientapp(self) -> None:
        """Kill the first SuperNode's ClientApp: the one at work, or else the next one.

        Raises:
            RunError: none came.
        """
        node = psutil.Process(self._nodes[0].process.pid)
        until = time.monotonic() + COMES_BACK_S
        while time.monotonic() < until:
            for process in node.children(recursive=True):
                try:
                    if any("flwr-clientapp" in part for part in process.cmdline()[:3]):
                        process.kill()
                        return
                except psutil.NoSuchProcess:  # it ended by itself meanwhile
                    continue
            time.sleep(0.02)
        raise RunError(f"no ClientApp to kill came within {COMES_BACK_S:g} s")

    def kill_supernode(self) -> None:
        """Kill the first SuperNode with its ClientApp, and start it until it stays.

        The SuperLink refuses a key that it believes online: a service manager must try again.
        """
        end_tree(psutil.Process(self._nodes[0].process.pid))
        self._nodes[0].process.wait()
        until = time.monotonic() + COMES_BACK_S
        while time.monotonic() < until:
            self._nodes[0] = node = self._start_supernode(0)
            wait_until(partial(is_settled, node), COMES_BACK_S)
            if node.alive:
                return
            time.sleep(RESTART_S)


KILLS: dict[str, Callable[[FragileDeployment], None]] = {
    "ServerApp": FragileDeployment.kill_serverapp,
    "ClientApp": FragileDeployment.kill_clientapp,
    "SuperNode": FragileDeployment.kill_supernode,
    "SuperLink": FragileDeployment.kill_superlink,
}
# moment -> (round, stage) of the newest state
MOMENTS: dict[str, tuple[int, str] | None] = {
    "starting": None,
    "training": (1, "step"),
    "before evaluation": (1, "trained"),
    "between rounds": (1, "evaluated"),
    "second round": (2, "step"),
}


class KillTrigger:
    """Looks at a server's kept states, acts at a row of ``MOMENTS``, notes when the next came."""

    def __init__(self, server: Path, moment: str, act: Callable[[], None]) -> None:
        self._server = server
        self._moment = MOMENTS[moment]
        self._act = act
        self._over = threading.Event()
        self.killed = 0.0
        self.again = 0.0
        self.why = ""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _newest(self) -> tuple[int, tuple[int, str]] | None:
        """Return (number, (round, stage)) of the newest state."""
        try:
            names = [p for p in (self._server / "state").iterdir() if STATE.fullmatch(p.name)]
            path = max(names, key=lambda p: p.name)
            document = json.loads(path.read_bytes())
            facts = document["facts"]
            return int(document["number"]), (int(facts["round"]), str(facts["stage"]))
        except (OSError, ValueError):
            return None

    def _reached(self) -> bool:
        if self._moment is None:
            return (self._server / "server.json").exists()
        newest = self._newest()
        return newest is not None and newest[1] == self._moment

    def _run(self) -> None:
        while not self._reached():
            if self._over.wait(0.02):
                return
        newest = self._newest()
        number = newest[0] if newest else 0
        self.killed = time.monotonic()
        try:
            self._act()
        except FedsplitError as error:
            self.killed, self.why = 0.0, str(error)
            return
        while not self._over.wait(0.05):
            newest = self._newest()
            if newest is not None and newest[0] > number:
                break
        self.again = time.monotonic()

    @property
    def recovered_s(self) -> float | None:
        """Seconds from the kill to the next state, None where none came."""
        return round(self.again - self.killed, 1) if self.again else None

    def stop(self) -> None:
        """Stop looking."""
        self._over.set()
        self._thread.join(60)


def cases(config: RunConfig, options: Mapping[str, Any], folder: Path) -> Iterator[Row]:
    """Carry out every case; a deployment of its own each, so that none inherits another's trouble.

    Raises:
        ConfigError: an unknown process or moment.
        RunError: the undisturbed run failed.
    """
    for process in options["processes"]:
        pick(KILLS, process, "process")
    for moment in options["process-moments"]:
        pick(MOMENTS, moment, "moment")
    owners = options["supernodes"]
    # Long enough rounds for a kill to come in the middle of one.
    config = replace(
        config,
        train=replace(config.train, min_owners=owners, epochs=4, max_steps=40),
        data=replace(config.data, owners=owners),
        session=replace(config.session, reconnect_s=10.0, wave_wait_s=180.0),
        output=replace(config.output, checkpoint_steps=5),
    )
    homes = folder / "homes"  # owners have the bottom after the first run
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run in the same --out
    tls = make_certificates(folder / "tls")
    reference, _, _ = _one(config, folder / "reference", homes, tls)
    if reference.error:
        raise RunError(f"the undisturbed run failed: {reference.error}")
    for process in options["processes"]:
        for moment in options["process-moments"]:
            where = folder / f"{process}-{moment}".replace(" ", "-")
            found, trigger, note = _one(config, where, homes, tls, process, moment)
            if trigger is None or not trigger.killed:
                said = trigger.why if trigger else ""
                why = found.error or said or "the run was over before the moment came"
                lost, recovered = f"not run: {why[:200]}", None
            else:
                recovered = trigger.recovered_s
                lost = describe_loss(found.error, found.model, reference.model, found.server)
            yield row_of(f"kill -9 {process}", moment, lost, recovered, note)


def _one(
    config: RunConfig,
    folder: Path,
    homes: Path,
    tls: Certificates,
    process: str = "",
    moment: str = "",
) -> tuple[RunOutcome, KillTrigger | None, str]:
    """Carry out one case, where no process is named an undisturbed run; the text is the note."""
    server = folder / "server"
    config = replace(config, output=replace(config.output, dir=str(server)))
    deployment = FragileDeployment(
        config.data.owners,
        log_dir=folder / "log",
        env={**owner_environment(homes), **tls.environment},
        server_threads=1,
        client_threads=1,
        node_auth=True,
    )
    trigger, error, starts = None, "", 0
    with deployment:
        if process:
            trigger = KillTrigger(server, moment, partial(KILLS[process], deployment))
        for _ in range(3):
            starts += 1
            try:
                deployment.run(ROOT, config.to_flat(), timeout_s=TIMEOUT_S)
                error = ""
                break
            except FedsplitError as failed:
                error = str(failed).splitlines()[0]
                if trigger is None or not trigger.killed:
                    break
                # What is starting again must be there before an operator starts the run again.
                wait_until(deployment.answers, 60.0, 1.0)
        if trigger is not None:
            trigger.stop()
    outcome = read_outcome(server, error)
    again = resumed(outcome.server)
    return outcome, trigger, f"{starts} starts" + (f", gone on {'; '.join(again)}" if again else "")
