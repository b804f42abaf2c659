"""Running one federation to its end and reading back what its server wrote."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsplit.config import RunConfig
from fedsplit.errors import RunError, check
from simulations.runtime.certificates import make_certificates
from simulations.runtime.deployment import Deployment
from simulations.runtime.federation import Federation, OnLine
from simulations.runtime.simulation import Simulation

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 6 * 3600.0


def owner_environment(folder: Path) -> dict[str, str]:
    """Return the variables that make a process a simulated owner with its home under ``folder``."""
    return {"FEDSPLIT_SIMULATION": "1", "FEDSPLIT_HOME": str(folder)}


def simulation_config(config: RunConfig, concurrency: int, folder: Path) -> RunConfig:
    """Return ``config`` for a simulation with that many owners at once, writing to ``folder``."""
    wave = min(config.session.wave or concurrency, concurrency)
    return replace(
        config,
        session=replace(config.session, wave=wave),
        train=replace(config.train, min_owners=max(config.train.min_owners, 1)),
        # Nobody takes up a run whose folder is removed at its start.
        output=replace(config.output, dir=str(folder), checkpoint_steps=-1),
    )


def simulate(
    config: RunConfig, folder: Path, *, cpus_per_owner: float = 0.5, on_line: OnLine | None = None
) -> tuple[RunConfig, dict[str, Any]]:
    """Run ``config`` with simulated owners on Ray.

    Args:
        config: the run's settings.
        folder: the run's folder; the server's files go to ``folder/server``.
        cpus_per_owner: cores one owner counts as.
        on_line: see :meth:`Federation.run`.

    Returns:
        The settings as they were run, and the content of ``server.json``.

    Raises:
        RunError: the run failed; names the component and its log.
    """
    server = folder / "server"
    homes = folder / "homes"
    simulation = Simulation(
        config.data.owners,
        log_dir=folder / "log",
        cpus_per_client=cpus_per_owner,
        env=owner_environment(homes),
        server_threads=config.output.threads or None,
        client_threads=config.output.owner_threads,
    )
    config = simulation_config(config, simulation.actors, server)
    return config, _run(simulation, config, server, homes, on_line)


def deploy(
    config: RunConfig, folder: Path, *, on_line: OnLine | None = None
) -> tuple[RunConfig, dict[str, Any]]:
    """Run ``config`` with a SuperLink and one SuperNode per owner on loopback, TLS everywhere.

    Args and returns as :func:`simulate`.

    Raises:
        RunError: the run failed; names the component and its log.
    """
    server = folder / "server"
    homes = folder / "homes"
    owners = config.data.owners
    check(owners <= 64, "data.owners", owners, "<= 64 for a deployment on one machine")
    tls = make_certificates(folder / "tls")
    deployment = Deployment(
        owners,
        log_dir=folder / "log",
        env={**owner_environment(homes), **tls.environment},
        server_threads=config.output.threads or None,
        client_threads=config.output.owner_threads,
    )
    config = replace(
        config,
        train=replace(config.train, min_owners=owners),
        output=replace(config.output, dir=str(server), checkpoint_steps=-1),
    )
    return config, _run(deployment, config, server, homes, on_line)


def _run(
    federation: Federation, config: RunConfig, server: Path, homes: Path, on_line: OnLine | None
) -> dict[str, Any]:
    shutil.rmtree(server, ignore_errors=True)
    with federation:
        federation.run(ROOT, config.to_flat(), timeout_s=TIMEOUT_S, on_line=on_line)
    shutil.rmtree(homes, ignore_errors=True)  # bottoms and simulated state; nothing to keep
    return read_server(server)


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
