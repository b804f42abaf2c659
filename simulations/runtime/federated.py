"""Running one federation to its end and reading back what its server wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsplit.config import RunConfig
from fedsplit.errors import RunError, check
from simulations.runtime.certificates import make_certificates
from simulations.runtime.deployment import Deployment
from simulations.runtime.federation import Federation, OnLine
from simulations.runtime.ledgers import sent_by_owners
from simulations.runtime.simulation import Simulation

OnStart = Callable[[Federation], None]
ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 6 * 3600.0
ENGINES = ("flower",)


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
    engine: str = "flower",
    on_line: OnLine | None = None,
    on_start: OnStart | None = None,
) -> tuple[RunConfig, dict[str, Any]]:
    """Run ``config`` with simulated owners on Ray.

    Args:
        config: the run's settings.
        folder: the run's folder; the server's files go to ``folder/server``.
        cpus_per_owner: cores one owner counts as.
        on_line: see :meth:`Federation.run`.

    Returns:
        The settings as they were run, and the content of ``server.json``; with ``sent``, see
        :func:`simulations.runtime.ledgers.sent_by_owners`.

    Raises:
        RunError: the run failed; names the component and its log.
    """
    simulation = Simulation(
        config.data.owners,
        cpus_per_client=cpus_per_owner,
        env=owner_environment(folder / "homes"),
        **_shared(config, folder),
    )
    config = simulation_config(config, simulation.actors, folder / "server")
    return config, _run(simulation, config, folder, on_line, on_start)


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
    for old in ("server", "homes"):
        shutil.rmtree(folder / old, ignore_errors=True)
    with federation:
        if on_start is not None:
            on_start(federation)
        federation.run(ROOT, config.to_flat(), timeout_s=TIMEOUT_S, on_line=on_line)
    content = read_server(folder / "server")
    content["sent"] = sent_by_owners(folder / "homes")
    shutil.rmtree(folder / "homes", ignore_errors=True)  # bottoms and simulated state
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
