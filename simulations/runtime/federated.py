"""Running one federation to its end and reading back what its server wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsplit.config import RunConfig
from fedsplit.errors import RunError, check, one_of
from simulations.runtime.certificates import make_certificates
from simulations.runtime.deployment import Deployment
from simulations.runtime.federation import Federation
from simulations.runtime.hosts.launch import MOST_AT_ONCE, HostedSimulation
from simulations.runtime.launcher import Launcher, OnLine
from simulations.runtime.ledgers import sent_by_owners
from simulations.runtime.simulation import Simulation, actors_at_once

OnStart = Callable[[Launcher], None]
ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 6 * 3600.0
ENGINES = ("hosts", "flower")


def owner_environment(folder: Path) -> dict[str, str]:
    """Return the variables that make a process a simulated owner with its home under ``folder``."""
    return {"FEDSPLIT_SIMULATION": "1", "FEDSPLIT_HOME": str(folder)}


def simulation_config(config: RunConfig, concurrency: int, folder: Path) -> RunConfig:
    """Return ``config`` for a simulation with that many owners at once, writing to ``folder``."""
    wave = min(config.session.wave or concurrency, concurrency)
    session = replace(config.session, wave=wave)
    train = replace(config.train, min_owners=max(config.train.min_owners, 1))
    return replace(everyone_config(config, folder), session=session, train=train)


def simulate(
    config: RunConfig,
    folder: Path,
    *,
    cpus_per_owner: float = 0.5,
    engine: str = ENGINES[0],
    ray_address: str = "",
    on_line: OnLine | None = None,
    on_start: OnStart | None = None,
) -> tuple[RunConfig, dict[str, Any]]:
    """Run ``config`` with simulated owners on Ray.

    Both engines give the same model for the same settings, bit for bit.

    Args:
        config: the run's settings; ``session.wave`` 0 becomes the number of owners that Flower's
            engine would work for at once.
        folder: the run's folder; the server's files go to ``folder/server``.
        cpus_per_owner: cores one owner counts as.
        engine: ``hosts``: a few processes for all owners (:class:`HostedSimulation`); ``flower``:
            Flower's own (:class:`Simulation`).
        ray_address: of a cluster that the hosts are to be on; empty: this machine.
        on_line: see :meth:`Federation.run`.
        on_start: called with the runtime when its processes may start.

    Returns:
        The settings as they were run, and the content of ``server.json``; with ``sent``, see
        :func:`simulations.runtime.ledgers.sent_by_owners`, and ``hosts`` of the engine of that
        name: their number, and the batches of messages to and from them.

    Raises:
        ConfigError: a parameter out of its range, or a cluster for Flower's engine.
        RunError: the run failed; names the component and its log.
    """
    one_of("engine", engine, ENGINES)
    if engine == "hosts":
        return _hosted(config, folder, cpus_per_owner, ray_address, on_line, on_start)
    check(not ray_address, "ray_address", ray_address, "empty with engine=flower")
    simulation = Simulation(
        config.data.owners,
        cpus_per_client=cpus_per_owner,
        env=owner_environment(folder / "homes"),
        **_shared(config, folder),
    )
    config = simulation_config(config, simulation.actors, folder / "server")
    return config, _run(simulation, config, folder, on_line, on_start)


def _hosted(
    config: RunConfig,
    folder: Path,
    cpus_per_owner: float,
    address: str,
    on_line: OnLine | None,
    on_start: OnStart | None,
) -> tuple[RunConfig, dict[str, Any]]:
    one_of("strategy", config.strategy, ("split-tuning", "offsite-tuning"))
    hosted = HostedSimulation(
        config.data.owners,
        cpus_per_client=cpus_per_owner,
        address=address,
        env=owner_environment(folder / "homes"),
        **_shared(config, folder),
    )
    usual = actors_at_once(config.data.owners, cpus_per_owner)
    most = MOST_AT_ONCE if config.session.wave else usual
    config = simulation_config(config, most, folder / "server")
    _clear(folder)
    with hosted:
        if on_start is not None:
            on_start(hosted)
        hosted.run(config, folder / "homes", timeout_s=TIMEOUT_S, on_line=on_line)
    content = read_server(folder / "server")
    facts = json.loads((folder / "server" / "hosts.json").read_bytes())
    sent = facts.pop("sent")
    content |= {"hosts": facts, "sent": sent_by_owners(folder / "homes") if sent is None else sent}
    _clear(folder, "homes", "homes-shared")
    return config, content


def _clear(folder: Path, *names: str) -> None:
    for old in names or ("server", "homes", "homes-shared"):
        shutil.rmtree(folder / old, ignore_errors=True)


def deploy(
    config: RunConfig, folder: Path, *, on_line: OnLine | None = None
) -> tuple[RunConfig, dict[str, Any]]:
    """Run ``config`` with a SuperLink and one SuperNode per owner on loopback, TLS everywhere.

    Args and returns as :func:`simulate`.

    Raises:
        RunError: the run failed; names the component and its log.
    """
    owners = config.data.owners
    check(owners <= 64, "data.owners", owners, "<= 64 for a deployment on one machine")
    env = owner_environment(folder / "homes") | make_certificates(folder / "tls").environment
    deployment = Deployment(owners, env=env, **_shared(config, folder))
    config = everyone_config(config, folder / "server")
    return config, _run(deployment, config, folder, on_line)


def everyone_config(config: RunConfig, server: Path) -> RunConfig:
    """Return ``config`` for a run of all owners or none, whose server writes to ``server``."""
    # Nobody takes up a run whose folder is removed at its start.
    output = replace(config.output, dir=str(server), checkpoint_steps=-1)
    train = replace(config.train, min_owners=config.data.owners)
    return replace(config, train=train, output=output)


def _shared(config: RunConfig, folder: Path) -> dict[str, Any]:
    threads = config.output.threads or None, config.output.owner_threads
    return {"log_dir": folder / "log", "server_threads": threads[0], "client_threads": threads[1]}


def _run(
    federation: Federation,
    config: RunConfig,
    folder: Path,
    on_line: OnLine | None,
    on_start: OnStart | None = None,
) -> dict[str, Any]:
    _clear(folder)
    with federation:
        if on_start is not None:
            on_start(federation)
        federation.run(ROOT, config.to_flat(), timeout_s=TIMEOUT_S, on_line=on_line)
    content = read_server(folder / "server")
    content["sent"] = sent_by_owners(folder / "homes")
    _clear(folder, "homes")  # bottoms and simulated state
    return content


def read_server(folder: Path) -> dict[str, Any]:
    """Return what the server wrote.

    Raises:
        RunError: if it wrote nothing readable, or says that it failed.
    """
    path = folder / "server.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"server: nothing readable in {path}: {error}") from None
    if content.get("status") != "completed":
        raise RunError(f"server: run is {content.get('status')}: {content.get('error', '')}")
    return dict(content)
