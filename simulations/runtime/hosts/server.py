"""The process of a simulated run: strategy and sessions here, owners in hosts.

Run as a module, with a JSON file that says what (:class:`Told`); see
:class:`simulations.runtime.hosts.launch.HostedSimulation`, which starts it.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedsplit import storage
from fedsplit.config import RunConfig
from fedsplit.errors import FedsplitError
from fedsplit.owners.data_source import share_key, simulated_shares
from fedsplit.owners.naming import SIMULATION_VARIABLE
from fedsplit.registry import pick
from fedsplit.wire.dial import is_loopback
from fedsplit.wire.logs import join_flower_log
from simulations.runtime.certificates import make_certificates
from simulations.runtime.hosts.host_grid import HostGrid
from simulations.runtime.hosts.owner_host import HostSettings
from simulations.runtime.hosts.ray_hosts import (
    RayHost,
    addresses,
    gather_sent,
    hand_out,
    join,
    own_address,
    start_hosts,
    stop_hosts,
)
from strategies.offsite_tuning.strategy import OffsiteTuning
from strategies.rounds.run_strategy import RunStrategy
from strategies.split_tuning.strategy import SplitTuning

RUN_ID = 1
FILE = "hosts.json"  # in the server's folder
KINDS: dict[str, type[RunStrategy]] = {
    "split-tuning": SplitTuning,
    "offsite-tuning": OffsiteTuning,
}


@dataclass(frozen=True)
class Told:
    """What the process is told.

    Attributes:
        run: the run's settings, flat.
        hosts: processes of owners on this machine.
        address: of a Ray cluster; empty: one of our own.
        homes: folder of the owners' homes on this machine.
        scratch: folder for Ray's files and certificates.
        variables: of the hosts' environment.
    """

    run: dict[str, Any]
    hosts: int
    address: str
    homes: str
    scratch: str
    variables: dict[str, str]


def main(path: Path) -> None:
    """Carry out the run that the file describes.

    Raises:
        FedsplitError: the run failed.
    """
    told = Told(**json.loads(path.read_bytes()))
    config = RunConfig.from_flat(told.run)
    os.environ[SIMULATION_VARIABLE] = "1"
    join_flower_log()
    kind = pick(KINDS, config.strategy, "strategy")
    nodes = join(told.address, told.hosts, told.variables, Path(told.scratch) / "ray")
    config = reachable(config, Path(told.scratch)) if told.address else config
    hosts: list[RayHost] = []
    try:
        wave = config.session.wave
        # All owners of a wave are connected at once; offsite owners come and go.
        slots = wave if config.strategy == "split-tuning" else max(1, wave // len(nodes))
        settings = HostSettings(config, RUN_ID, slots)
        shares = simulated_shares(*share_key(config))
        hosts = start_hosts(nodes, settings, shares, None if told.address else Path(told.homes))
        grid = HostGrid(hosts, config.data.owners, RUN_ID)
        torch.manual_seed(config.seed)
        with kind.open(config, run_id=RUN_ID) as strategy:
            out = strategy.handed_out
            hand_out(hosts, out.kind, out.digest, out.files)
            strategy.start(grid)
        sent = gather_sent(hosts) if told.address else None
        write_facts(Path(config.output.dir) / FILE, grid, len(nodes), sent)
    finally:
        stop_hosts(hosts)


def write_facts(path: Path, grid: HostGrid, hosts: int, sent: list[dict[str, Any]] | None) -> None:
    """Write what the run's page does not know: hosts, batches, ledgers on other machines."""
    facts = {"hosts": hosts, "messages": grid.batches, "sent": sent}
    storage.write(path, json.dumps(facts), durable=False)


def reachable(config: RunConfig, scratch: Path) -> RunConfig:
    """Return the settings with which owners on the cluster's machines reach the session server.

    With nodes on other machines it listens where they reach this one, with a certificate made for
    the run; whoever named a host, or certificates, has decided.
    """
    own = own_address()
    others = {address for address in addresses() if address != own and not is_loopback(address)}
    if not others or not is_loopback(config.session.host):
        return config
    if "FEDSPLIT_TLS_CERT" not in os.environ:
        os.environ.update(make_certificates(scratch / "tls", [own]).environment)
    return replace(config, session=replace(config.session, host=own))


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except FedsplitError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
